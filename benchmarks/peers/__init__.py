"""Steps of other trainers on the same job, each in processes of its own: see benchmarks/beside_peers.py."""
