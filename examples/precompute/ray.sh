#!/bin/sh
# The KV of a corpus by workers on Ray, then its index, then a question of the corpus:
#   ./ray.sh ../world/documents.jsonl "Which country does Hexstead belong to?"
# What follows is for `precompute`, on a cluster such as: --address auto --workers 8 --gpus-per-worker 1
set -eu
STORE=${STORE:-my-store}
documents=$1 question=$2
shift 2

python -m ragcache precompute "$documents" --store "$STORE" --engine ray --workers 2 "$@"
python -m ragcache index "$documents" --store "$STORE" # embeds the chunks: their KV is there
python -m ragcache query "$question" --store "$STORE" --explain
