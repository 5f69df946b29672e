"""The SAE that ships here, with its feature index; `sae/README.md` says how it was made."""

from pathlib import Path


def embedded_sae_path() -> Path:
    """Return the folder of the embedded SAE, for `AutoModel.from_pretrained` and `FeatureIndex.open`.

    It is a Matryoshka SAE of 2,048 latents on layer 2 of the embedded language model, with statistics of its latents
    and a feature index.

    Raises:
        `FileNotFoundError`: If the installation lacks the SAE.
    """
    folder = Path(__file__).parent / "sae"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"Expected the embedded SAE in {folder}, found none there. Reinstall the package.")
    return folder
