#!/usr/bin/env bash
# Megatron Bridge's switch at its usual path: which revision of the training core the two doors import.
# usage: ./scripts/switch_mcore.sh status|main|dev
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in
    status | main | dev) ;;
    *)
        echo "usage: ./scripts/switch_mcore.sh status|main|dev" >&2
        exit 2
        ;;
esac
python="${PYTHON:-}"
if [ -z "$python" ]; then
    python="$root/.venv/bin/python"
    [ -x "$python" ] || python=python3
fi
PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m lockstep.cli core "$1"
