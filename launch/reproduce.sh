#!/bin/bash
# The road of the paper in order: count the six models, train them (two seeds, then the better one), write weights.
#
#     DREAMER_PREPARED=/prepared launch/reproduce.sh [arguments of launch/reproduce.py]
#
# May be stopped and started again at any moment. Environment: DREAMER_PREPARED (see configs/la_1b.py), DREAMER_PYTHON
# (default: python). With --models only those are trained; --dry-run and --help show what would come.

set -euo pipefail
cd "$(dirname "$0")/.."
python=${DREAMER_PYTHON:-python}
if ! command -v "$python" >/dev/null; then
    echo "no program '$python': set DREAMER_PYTHON to the python of the environment" >&2
    exit 2
fi

case " $* " in
    *" --dry-run "* | *" --help "* | *" -h "*) exec "$python" launch/reproduce.py "$@" ;;
esac
: "${DREAMER_PREPARED:?the folder of the prepared data (configs/la_1b.py)}"

for model in la_1b dr_1b dr_da_1b la_2b dr_2b dr_da_2b; do
    "$python" -m dreamer_jax.plan --config "configs/$model.py"
done

"$python" launch/reproduce.py "$@"

"$python" launch/reproduce.py --winners "$@" | while read -r model run; do
    [[ -e out/$model ]] || "$python" -m dreamer_jax.convert --checkpoint "$run" --to safetensors --out "out/$model"
done
