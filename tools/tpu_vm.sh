#!/usr/bin/env bash
# Creates a TPU VM, installs this repository on all its hosts, runs there.
#
#   ZONE=us-central2-b TYPE=v4-32 tools/tpu_vm.sh create NAME
#   ZONE=us-central2-b tools/tpu_vm.sh install NAME
#   ZONE=us-central2-b tools/tpu_vm.sh run NAME --config FILE.py --workdir DIR
#   ZONE=us-central2-b tools/tpu_vm.sh logs|delete NAME
#
# With --dry_run as the first argument, commands are printed and not run.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 1
}

call() {
  if [[ $dry_run == yes ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all_hosts() {
  call gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker=all \
    --command="$1"
}

dry_run=no
if [[ ${1:-} == --dry_run ]]; then
  dry_run=yes
  shift
fi
[[ $# -ge 2 ]] || fail "give create, install, run, logs or delete, and a NAME"
what=$1
name=$2
shift 2
[[ -n ${ZONE:-} ]] || fail "ZONE is not set, such as ZONE=us-central2-b"

case $what in
  create)
    [[ -n ${TYPE:-} ]] || fail "TYPE is not set, such as TYPE=v4-32"
    # A queued resource waits until there is room; --spot may be preempted.
    call gcloud compute tpus queued-resources create "$name" \
      --node-id="$name" --zone="$ZONE" --accelerator-type="$TYPE" \
      --runtime-version="${VERSION:-tpu-ubuntu2204-base}" --spot
    ;;
  install)
    files=$(mktemp)
    trap 'rm -f "$files"' EXIT
    call git archive --format=tar.gz --output="$files" HEAD
    call gcloud compute tpus tpu-vm scp "$files" "$name:sigjax.tar.gz" \
      --zone="$ZONE" --worker=all
    on_all_hosts "sudo apt-get install -y python3.11-venv && mkdir -p sigjax &&
tar xzf sigjax.tar.gz -C sigjax && python3.11 -m venv venv &&
venv/bin/pip install -e sigjax 'jax[tpu]'"
    ;;
  run)
    # It outlives the connection. A kill by the system is followed by a restart,
    # a mistake or a stop (exit code 1) is not.
    command="cd sigjax && while ../venv/bin/python -m sigjax.train$(
      printf ' %q' "$@"
    ); [ \$? -gt 1 ]; do sleep 10; done"
    on_all_hosts "nohup bash -c $(printf %q "$command") >> run.log 2>&1 &"
    ;;
  logs)
    call gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker=0 \
      --command="tail -n 100 -f run.log"
    ;;
  delete)
    call gcloud compute tpus queued-resources delete "$name" --zone="$ZONE" \
      --force --quiet
    ;;
  *) fail "\"$what\" is not create, install, run, logs or delete" ;;
esac
