#!/bin/sh
# Add a document, ask for it in three ways, look at what it cost, and delete it.
# KEY: an API key, where the service asks for one. URL: where it is.
set -eu
URL=${URL:-http://127.0.0.1:8000}

ask() {
  path=$1
  shift
  curl --fail-with-body --silent --show-error --no-buffer "$URL$path" \
    -H "Authorization: Bearer ${KEY:-none}" -H "Content-Type: application/json" "$@"
  echo
}

ask /health
ask /ready
ask /v1/documents -d '{"documents": [{"id": "holt", "text": "Mira Holt lives in Oslo."}]}'
ask /v1/query -d '{"question": "Where does Mira Holt live?"}'
ask /v1/query -d '{"question": "Where does Mira Holt live?", "mode": "full", "stream": true}'
ask /v1/chat/completions -d '{
  "model": "ragcache",
  "messages": [{"role": "user", "content": "What does Corvex Mills make?"}],
  "documents": [{"title": "Corvex Mills", "text": "Corvex Mills makes clocks."}],
  "ragcache": {"mode": "fused", "ratio": 0.15}
}'
ask /v1/jobs -d '{"documents": [{"id": "mill", "text": "The old mill stands in Bexley."}]}'
ask /v1/jobs
ask /v1/documents
ask /v1/documents/holt -X DELETE
