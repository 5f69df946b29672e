#!/usr/bin/env bash
# A virtual environment that holds this package and the libraries it is measured against.
#
#     benchmarks/make_environment.sh [FOLDER]     (default: .venv-benchmarks)
#
# torch comes first and by itself, and a constraint keeps it, so that nothing that follows brings another build: a CPU
# or a GPU build, whichever pip finds for this machine.
set -euo pipefail

folder=${1:-.venv-benchmarks}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."

python3 -m venv "$folder"
python="$folder/bin/python"
"$python" -m pip install torch==2.13.0
"$python" -m pip freeze | grep '^torch==' >"$folder/constraints.txt"
"$python" -m pip install --constraint "$folder/constraints.txt" -e . 'transformers==5.23.*' \
  'sae-lens==6.54.*' 'eai-sparsify==1.3.3' 'dictionary-learning==0.1.*' matplotlib
# nnsight asks for torchvision, which nothing here uses. Where its build does not match torch's (CUDA beside CPU), its
# mere presence keeps transformers from importing.
"$python" -m pip uninstall --yes torchvision

SPARSIFY_DISABLE_TRITON=1 "$python" - <<'PYTHON'
from importlib.metadata import version

import dictionary_learning, hf_matryoshka_sae, sae_lens, sparsify

for name in ("torch", "transformers", "hf_matryoshka_sae", "sae-lens", "eai-sparsify", "dictionary-learning"):
    print(f"{name:<20} {version(name)}")
PYTHON
