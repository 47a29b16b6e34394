# shellcheck shell=bash disable=SC2034,SC2153  # shared variables; options are set by `parse`
# What the scripts for GKE share, on top of common.sh and pod.sh.

# xpk_type: TYPE, xpk's word for the chips of --topology: v5p:8x8x8 -> v5p-8x8x8.
xpk_type() {
  need topology
  read_topology "$TOPOLOGY"
  case "$KIND" in
    v5e) TYPE="v5litepod-$GRID" ;;
    v7x) TYPE="tpu7x-$GRID" ;;
    *) TYPE="$KIND-$GRID" ;;
  esac
}

# gke_capacity: CAPACITY in xpk's words.
gke_capacity() {
  case "${SPOT:+spot}${RESERVATION:+reservation}${ON_DEMAND:+demand}${FLEX:+flex}" in
    spot) CAPACITY=(--spot) ;;
    reservation) CAPACITY=("--reservation=$RESERVATION") ;;
    demand) CAPACITY=(--on-demand) ;;
    flex) CAPACITY=(--flex) ;;
    "") die "$EXIT_USAGE" "say how it is paid: --spot, --reservation NAME, --flex or --on-demand" ;;
    *) die "$EXIT_USAGE" "the settings name several of spot, reservation, flex and on-demand; keep one" ;;
  esac
}

# xpk_run WORDS...: an xpk command with project and zone.
xpk_run() { run xpk "$@" "--project=$PROJECT" "--zone=$ZONE"; }
