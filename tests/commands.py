"""The reference pair: the two commands that the first issue of every user starts from."""

FLAGS = (
    "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 1024 --seq-length 512 "
    "--max-position-embeddings 512 --micro-batch-size 4 --global-batch-size 32 --train-iters 10 --eval-iters 2 "
    "--eval-interval 10 --mock-data --bf16 --use-mcore-models --tokenizer-type NullTokenizer --vocab-size 32000 "
    "--lr 3e-4 --min-lr 3e-5 --seed 1234 --log-interval 1"
).split()
RECIPE = (
    "--recipe vanilla_gpt_pretrain_config model.num_layers=2 model.hidden_size=256 model.num_attention_heads=4 "
    "model.ffn_hidden_size=1024 model.seq_length=512 dataset.sequence_length=512 train.train_iters=10 "
    "train.global_batch_size=32 train.micro_batch_size=4 validation.eval_interval=10 validation.eval_iters=2 "
    "optimizer.lr=3e-4 optimizer.min_lr=3e-5 scheduler.lr_warmup_iters=1 scheduler.lr_decay_iters=10 rng.seed=1234 "
    "logger.log_interval=1"
).split()
TINY = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --micro-batch-size 2 "
    "--global-batch-size 4 --train-iters 3 --mock-data --tokenizer-type NullTokenizer --vocab-size 64 --lr 1e-3"
).split()
