"""The Space: the page of `hf_matryoshka_sae.space`, open at the embedded SAE or at what the Space's variables name.

    python spaces_app/app.py

`MATRYOSHKA_SAE` names a repository to open first, `MATRYOSHKA_DATASET` a data set with a column `text` to measure on.
"""

import os


try:
    import spaces  # noqa: F401  (on ZeroGPU this has to come before torch)
except ImportError:
    pass

from hf_matryoshka_sae.space import Library, build_demo, launch


library = Library(
    dataset=os.environ.get("MATRYOSHKA_DATASET") or None,
    folders=not os.environ.get("SPACE_ID"),  # visitors of a Space have no business in its folders
)
demo = build_demo(library, os.environ.get("MATRYOSHKA_SAE") or "embedded", warm=True)

if __name__ == "__main__":
    launch(demo)
