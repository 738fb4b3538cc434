#!/usr/bin/env bash
# What `make bench-site` compares a cold site.yml with: the same two bare lab hosts brought to the same answered question by a plain script,
# as the seed's tutorial does it with docker and curl. It knows the hosts, asks nothing, checks nothing that it does not need, and cannot be run
# twice. Both hosts are worked on at the same time, which favours it. What it leaves out: doors and keys before the engines, firewall,
# TLS, hardened units, health timers, users of their own, rotation, closed registration; its passwords are the seed's kind.
#   by_hand.sh 172.31.82      the first three octets of the lab's network
set -euo pipefail
cd "$(dirname "$0")/.."
APP=$1.11 GPU=$1.12 INFRA=$1.2
SSH="ssh -o BatchMode=yes -i .lab/ssh/id_ed25519 -o UserKnownHostsFile=.lab/ssh/known_hosts"
LOCKS=roles/model_server/files/requirements

models() {
  tar -C $LOCKS -c transformers.txt infinity.txt | $SSH ops@"$GPU" tar -x
  $SSH ops@"$GPU" sudo env INFRA="$INFRA" bash -seuo pipefail <<'END'
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends python3-venv ca-certificates curl
mkdir -p /srv/models /srv/hf/hub
for model in tiny-qwen2-chat all-MiniLM-L6-v2 tiny-cross-encoder; do
  curl -fsS "http://$INFRA:8080/models/$model.tar" | tar -x -C /srv/models
done
for engine in transformers infinity; do
  python3 -m venv /srv/$engine
  pip="/srv/$engine/bin/pip install -q --no-deps --no-index --find-links http://$INFRA:8080/wheels/ --trusted-host $INFRA"
  $pip -r ~ops/$engine.txt
  $pip torch==2.13.0
done
common="--setenv=HF_HOME=/srv/hf --setenv=HF_HUB_OFFLINE=1 --setenv=TRANSFORMERS_OFFLINE=1 --setenv=DO_NOT_TRACK=1 --setenv=OMP_NUM_THREADS=1"
systemd-run -q --unit chat $common --working-directory=/srv/models /srv/transformers/bin/transformers serve tiny-qwen2-chat \
  --continuous-batching --cb-num-blocks 64 --cb-max-batch-tokens 512 --device cpu --reasoning off --host 0.0.0.0 --port 8001
systemd-run -q --unit infinity $common --working-directory=/srv/models \
  --setenv='INFINITY_MODEL_ID=/srv/models/all-MiniLM-L6-v2;/srv/models/tiny-cross-encoder;' \
  --setenv='INFINITY_SERVED_MODEL_NAME=all-MiniLM-L6-v2;tiny-cross-encoder;' --setenv='INFINITY_ENGINE=torch;' --setenv='INFINITY_DEVICE=cpu;' \
  --setenv='INFINITY_COMPILE=0;' --setenv='INFINITY_MODEL_WARMUP=0;' --setenv='INFINITY_BETTERTRANSFORMER=0;' --setenv=INFINITY_URL_PREFIX=/v1 \
  --setenv=INFINITY_HOST=0.0.0.0 --setenv=INFINITY_PORT=8002 /srv/infinity/bin/infinity_emb v2
ask() { curl -fsS -o /dev/null --retry 120 --retry-delay 1 --retry-all-errors -H 'Content-Type: application/json' "$@"; }
ask -d '{"model":"tiny-qwen2-chat","max_tokens":1,"messages":[{"role":"user","content":"ping"}]}' http://127.0.0.1:8001/v1/chat/completions
ask -d '{"model":"all-MiniLM-L6-v2","input":["ping"]}' http://127.0.0.1:8002/v1/embeddings
ask -d '{"model":"tiny-cross-encoder","query":"ping","documents":["pong"]}' http://127.0.0.1:8002/v1/rerank
END
}

services() {
  $SSH ops@"$APP" sudo env APP="$APP" GPU="$GPU" INFRA="$INFRA" bash -seuo pipefail <<'END'
REGISTRY=$INFRA:5000
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends docker.io docker-cli ca-certificates curl openssl python3-pymongo
mkdir -p /etc/docker /srv/fastgpt /srv/oneapi/tiktoken
echo "{\"insecure-registries\": [\"$REGISTRY\"]}" > /etc/docker/daemon.json
systemctl restart docker
cd /srv/fastgpt

openssl rand -base64 756 > mongodb.key
chmod 400 mongodb.key
chown 999:999 mongodb.key
docker run -d --name mongo --restart always -p $APP:27017:27017 -v /srv/fastgpt/mongodb.key:/data/mongodb.key:ro -v /srv/fastgpt/mongo:/data/db \
  -e MONGO_INITDB_ROOT_USERNAME=myname -e MONGO_INITDB_ROOT_PASSWORD=mypassword $REGISTRY/docker.io/library/mongo:5.0.32 \
  mongod --replSet rs0 --keyFile /data/mongodb.key --bind_ip_all
docker run -d --name pg --restart always -p $APP:5432:5432 -v /srv/fastgpt/pg:/var/lib/postgresql/data -e POSTGRES_USER=username \
  -e POSTGRES_PASSWORD=password -e POSTGRES_DB=fastgpt $REGISTRY/docker.io/pgvector/pgvector:0.8.6-pg17
for file in 9b5ad71b2ce5302211f9c61530b329a4922fc6a4 fb374d419588a4632f3f557e76b4b70aebbca790; do
  curl -fsS -o /srv/oneapi/tiktoken/$file "http://$INFRA:8080/tiktoken/$file"
done
docker run -d --name oneapi --restart always -p $APP:8000:3000 -v /srv/oneapi:/data -e TIKTOKEN_CACHE_DIR=/data/tiktoken \
  $REGISTRY/docker.io/justsong/one-api:v0.6.10

python3 - "$APP" <<'PYTHON'
import sys, time, pymongo
for attempt in range(120):
    try:
        client = pymongo.MongoClient(f"mongodb://myname:mypassword@{sys.argv[1]}:27017/?authSource=admin&directConnection=true", serverSelectionTimeoutMS=1000)
        client.admin.command("replSetInitiate", {"_id": "rs0", "members": [{"_id": 0, "host": f"{sys.argv[1]}:27017"}]})
        break
    except pymongo.errors.PyMongoError as exc:
        if "already initialized" in str(exc):
            break
        time.sleep(0.5)
while not client.admin.command("hello").get("isWritablePrimary"):
    time.sleep(0.2)
PYTHON

api=http://$APP:8000/api
call() { curl -fsS -b jar -c jar -H 'Content-Type: application/json' "$@"; }
call --retry 60 --retry-delay 1 --retry-all-errors -o /dev/null $api/status
call -d '{"username":"root","password":"123456"}' $api/user/login
call -X PUT -d '{"username":"root","password":"byhand12345678"}' $api/user/self
call -d '{"name":"fastgpt","expired_time":-1,"remain_quota":0,"unlimited_quota":true}' $api/token/
key=$(call "$api/token/?p=0" | python3 -c 'import json, sys; print("sk-" + json.load(sys.stdin)["data"][0]["key"].removeprefix("sk-"))')
channel() { call -d "{\"name\":\"$1\",\"type\":$2,\"key\":\"none\",\"base_url\":\"http://$GPU:$3\",\"models\":\"$1\",\"group\":\"default\",\"groups\":[\"default\"]}" $api/channel/; }
channel tiny-qwen2-chat 1 8001
channel all-MiniLM-L6-v2 8 8002

cat > config.json <<JSON
{"systemEnv": {"vectorMaxProcess": 15, "qaMaxProcess": 15, "pgHNSWEfSearch": 100},
 "llmModels": [{"model": "tiny-qwen2-chat", "name": "tiny-qwen2-chat", "maxContext": 4096, "maxResponse": 512, "quoteMaxToken": 2000,
   "maxTemperature": 1.2, "charsPointsPrice": 0, "censor": false, "vision": false, "datasetProcess": true, "usedInClassify": true,
   "usedInExtractFields": true, "usedInToolCall": true, "usedInQueryExtension": true, "toolChoice": false, "functionCall": false,
   "customCQPrompt": "", "customExtractPrompt": "", "defaultSystemChatPrompt": "", "defaultConfig": {}}],
 "vectorModels": [{"model": "all-MiniLM-L6-v2", "name": "all-MiniLM-L6-v2", "charsPointsPrice": 0, "defaultToken": 500, "maxToken": 1800,
   "weight": 100, "defaultConfig": {}, "dbConfig": {}, "queryConfig": {}}],
 "reRankModels": [{"model": "tiny-cross-encoder", "name": "tiny-cross-encoder", "charsPointsPrice": 0,
   "requestUrl": "http://$GPU:8002/v1/rerank", "requestAuth": "none"}],
 "audioSpeechModels": [], "whisperModel": {"model": "whisper-1", "name": "Whisper1", "charsPointsPrice": 0}}
JSON
docker network create fastgpt
docker run -d --name sandbox --restart always --network fastgpt $REGISTRY/ghcr.io/labring/fastgpt-sandbox:v4.8.9
docker run -d --name fastgpt --restart always --network fastgpt -p $APP:8080:3000 -v /srv/fastgpt/config.json:/app/data/config.json:ro \
  -e DEFAULT_ROOT_PSW=1234 -e OPENAI_BASE_URL=http://$APP:8000/v1 -e CHAT_API_KEY=$key -e DB_MAX_LINK=30 -e TOKEN_KEY=any -e ROOT_KEY=root_key \
  -e FILE_TOKEN_KEY=filetoken -e "MONGODB_URI=mongodb://myname:mypassword@$APP:27017/fastgpt?authSource=admin&replicaSet=rs0" \
  -e "PG_URL=postgresql://username:password@$APP:5432/fastgpt" -e SANDBOX_URL=http://sandbox:3000 $REGISTRY/ghcr.io/labring/fastgpt:v4.8.9
END
}

models &
work=$!
services
wait $work

# a question through the whole chain, by the module that site.yml ends with too
answer=$(.venv/bin/ansible -o -i "$APP," all -u ops -b --private-key .lab/ssh/id_ed25519 -e ansible_python_interpreter=/usr/bin/python3 \
  --ssh-common-args="-o UserKnownHostsFile=.lab/ssh/known_hosts" -m selfhosted.fastgpt.fastgpt_check -a "{
    \"url\": \"http://$APP:8080\", \"version\": \"v4.8.9\", \"password\": \"1234\", \"chat_model\": \"tiny-qwen2-chat\",
    \"vector_model\": \"all-MiniLM-L6-v2\", \"rerank_model\": \"tiny-cross-encoder\", \"wait\": 300}")
echo "$answer"
[[ $answer == *'"ok": true'* && $answer != *'"ok": false'* ]]
