"""``lockstep generate``: text from a checkpoint of Lockstep or a Hugging Face folder."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.errors import UserError

if TYPE_CHECKING:
    from lockstep.data.tokenizers import Tokenizer
    from lockstep.generation.decode import Completion
    from lockstep.generation.prompts import Prompt
    from lockstep.generation.sampling import Sampling

_SEED = 1234


def register(subparsers: Any) -> None:
    """Add the ``generate`` subcommand to what ``ArgumentParser.add_subparsers`` returned."""
    parser = subparsers.add_parser(
        "generate",
        help="continue prompts with a model",
        description="Continue prompts with the model of a checkpoint in whatever layout it was saved, or of a "
        "Hugging Face folder. Adapters are added to the weights that they are for. One process, on a CPU or a GPU. "
        "Without --temperature the likeliest token is taken.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "model",
        type=Path,
        metavar="MODEL",
        help="folder of checkpoints, of whole weights or adapters; one checkpoint; or a Hugging Face folder",
    )
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be given several times")
    add(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help='JSON lines with "prompt", a text, or "messages", a conversation',
    )
    add("--chat", action="store_true", help="a prompt is what a user says: apply the tokenizer's chat template")
    add("--output", type=Path, metavar="FILE", help="write JSON lines with prompt, completion and tokens as well")
    _add_choice(parser)
    _add_model(parser)
    parser.set_defaults(func=_generate)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is chosen")
    add = group.add_argument
    add("--max-new-tokens", type=_positive, default=64, metavar="N", help="of each prompt, at most (default: 64)")
    add("--temperature", type=float, metavar="T", help="choose by chance, with logits divided by T")
    add("--top-k", type=int, metavar="N", help="by chance among the N likeliest tokens")
    add(
        "--top-p", type=float, metavar="P", help="by chance among the likeliest tokens with a probability of P together"
    )
    add("--seed", type=int, metavar="N", help=f"of chance (default: {_SEED})")
    add("--batch-size", type=_positive, default=8, metavar="N", help="prompts at a time (default: 8)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--ckpt-step", type=int, metavar="N", help="iteration instead of the newest")
    add(
        "--base",
        type=Path,
        metavar="BASE",
        help="where the weights of adapters are (default: where they were in training)",
    )
    add("--tokenizer", type=Path, metavar="FOLDER", help="in the place of the model's own tokenizer")
    add("--token-ids", action="store_true", help="prompts and completions are numbers: no tokenizer is needed")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="to compute in (default: float32 on a CPU, as stored on a GPU)",
    )
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: a GPU where there is one)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0")
    return int(text)


def _generate(options: argparse.Namespace) -> int:
    import torch

    from lockstep.generation.decode import generate
    from lockstep.generation.load import load
    from lockstep.generation.prompts import read_prompts
    from lockstep.training.device import choose_device

    sampling = _sampling(options)
    if options.token_ids and options.tokenizer is not None:
        raise UserError("--token-ids does without a tokenizer, so --tokenizer has no effect; drop one of the two")
    device = choose_device(options.device)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    loaded = load(
        options.model,
        step=options.ckpt_step,
        dtype=dtype,
        device=device,
        tokenizer=options.tokenizer,
        token_ids=options.token_ids,
        base=options.base,
    )
    prompts = read_prompts(options.prompt, options.prompts_file, loaded.tokenizer, chat=options.chat)
    began = time.perf_counter()
    completions = generate(
        loaded.model,
        [prompt.tokens for prompt in prompts],
        max_new_tokens=options.max_new_tokens,
        stop=loaded.stop,
        sampling=sampling,
        vocabulary=loaded.tokenizer.vocab_size,
        batch_size=options.batch_size,
    )
    seconds = time.perf_counter() - began
    _show(prompts, completions, loaded.tokenizer, options.output)
    tokens = sum(len(completion.tokens) for completion in completions)
    kind = str(loaded.model.dtype).removeprefix("torch.")
    print(
        f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.0f} tokens/s), {kind} on {device.type}",
        file=sys.stderr,
    )
    return 0


def _sampling(options: argparse.Namespace) -> "Sampling":
    from lockstep.generation.sampling import Sampling

    chance = {"top_k": options.top_k, "top_p": options.top_p, "seed": options.seed}
    given = {name: value for name, value in chance.items() if value is not None}
    if given and not options.temperature:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{names}: without a --temperature above 0 the likeliest token is taken; give one, such as 1.0")
    return Sampling(temperature=options.temperature or 0.0, **given)


def _show(
    prompts: "list[Prompt]",
    completions: "list[Completion]",
    tokenizer: "Tokenizer",
    output: Path | None,
) -> None:
    lines = []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=1):
        text = _text(prompt, completion, tokenizer)
        ended = "stop token" if completion.stopped else "length"
        print(f"[{number}] {prompt.text}\n--> {text}\n    {len(completion.tokens)} tokens, ended by {ended}")
        record = {
            "prompt": prompt.text,
            "completion": text,
            "prompt_tokens": prompt.tokens,
            "completion_tokens": completion.tokens,
            "ended_by": ended,
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    if output is not None:
        try:
            output.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror or error}") from None


def _text(prompt: "Prompt", completion: "Completion", tokenizer: "Tokenizer") -> str:
    """Return the completion without its stop token, with the space that some tokenizers put before a word."""
    tokens = completion.tokens[:-1] if completion.stopped else completion.tokens
    before = tokenizer.detokenize(prompt.tokens)
    whole = tokenizer.detokenize([*prompt.tokens, *tokens])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.detokenize(tokens)
