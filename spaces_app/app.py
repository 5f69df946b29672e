"""The Space: the page of `hf_matryoshka_sae.space`, open at the embedded SAE or at what the Space's variables name.

    python spaces_app/app.py

`MATRYOSHKA_SAE` names a repository to open first, `MATRYOSHKA_DATASET` a data set with a column `text` to measure on.
`MATRYOSHKA_MOST_GIGABYTES` is how much of an SAE, and of its language model, is fetched at most (4). With
`MATRYOSHKA_OWN_TOKEN` set, visitors read what the Space's own token may read.
"""

import contextlib
import os


with contextlib.suppress(ImportError):
    import spaces  # noqa: F401  (on ZeroGPU this has to come before torch)

from hf_matryoshka_sae.space import Library, build_demo, launch
from hf_matryoshka_sae.space.limits import forget_own_token


ON_A_SPACE = bool(os.environ.get("SPACE_ID"))
if ON_A_SPACE and not os.environ.get("MATRYOSHKA_OWN_TOKEN"):
    forget_own_token()  # a secret of the Space's is not for its visitors

library = Library(
    dataset=os.environ.get("MATRYOSHKA_DATASET") or None,
    public=ON_A_SPACE,
    most_gigabytes=float(os.environ.get("MATRYOSHKA_MOST_GIGABYTES") or 0) or None,
)
demo = build_demo(library, os.environ.get("MATRYOSHKA_SAE") or "embedded", warm=True)

if __name__ == "__main__":
    launch(demo)
