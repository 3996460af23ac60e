#!/bin/sh
# A server of vLLM, and ragcache's service in front of it, with one store; both end together.
#   MODEL=Qwen/Qwen2.5-0.5B-Instruct VLLM=vllm/bin/python ./serve.sh
#   ../serve/curl.sh
# VLLM: the Python that vLLM is installed for, with ragcache beside it (docs/vllm.md, Install).
# WORKER: ragcache.vllm.cpu.CPUWorker where there is no GPU. What follows is for vLLM.
set -eu
VLLM=${VLLM:-python} WORKER=${WORKER:-ragcache.vllm.gpu.GPUWorker}
STORE=$(realpath -m "${STORE:-my-store}") DTYPE=${DTYPE:-bfloat16}
PORT=${PORT:-8000} BEHIND=${BEHIND:-8001}

"$VLLM" -m vllm.entrypoints.openai.api_server --model "$MODEL" --dtype "$DTYPE" \
  --host 127.0.0.1 --port "$BEHIND" --worker-cls "$WORKER" --kv-transfer-config '{
    "kv_connector": "RagCacheConnector", "kv_connector_module_path": "ragcache.vllm.connector",
    "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"store": "'"$STORE"'"}}' "$@" &
running=$!
trap 'kill $running 2>/dev/null; wait' EXIT
trap 'exit 0' INT TERM

until curl --fail --silent "http://127.0.0.1:$BEHIND/health"; do # loading takes a minute and more
  sleep 1
  kill -0 $running # or ends here, with what vLLM said above
done
python -m ragcache serve --engine vllm --base-url "http://127.0.0.1:$BEHIND" \
  --store "$STORE" --model "$MODEL" --dtype "$DTYPE" --port "$PORT" &
running="$! $running"
wait $!
