#!/usr/bin/env bash
# Makes a GKE cluster with TPU slices, through xpk.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
# shellcheck source=../pod.sh
source "$(dirname "${BASH_SOURCE[0]}")/../pod.sh"
# shellcheck source=gke.sh
source "$(dirname "${BASH_SOURCE[0]}")/gke.sh"

USAGE="\
xpk/create_cluster.sh --cluster C --topology KIND:GRID (--spot | --reservation R | ...) [options]

Makes a GKE cluster whose node pools are TPU slices. Called again with another --node-count it
adds or takes away slices.

  --project P --zone Z --cluster C
  --topology v5p:8x8x8        chips of one slice, as in iv2 plan (v4 v5e v5p v6e v7x)
  --node-count N              slices; default 1
  --spot, --on-demand, --flex, --reservation R   how it is paid
  --settings FILE             defaults (else ./tpu.env); see env.example
  --dry-run                   print the commands, run nothing

examples:
  xpk/create_cluster.sh --cluster iv2 --topology v6e:16x16 --node-count 2 --spot"

parse "cluster topology node-count spot reservation on-demand flex" "$@"
need project zone
need_name cluster
need_number node-count 1
xpk_type
gke_capacity
need_tools xpk kubectl
need_login
xpk_run cluster create "--cluster=$CLUSTER" "--tpu-type=$TYPE" "--num-slices=$NODE_COUNT" \
  "${CAPACITY[@]}" || die "$EXIT_FAILED" "xpk could not make $CLUSTER; its messages are above"
