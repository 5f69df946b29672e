"""The SAE that ships here, with its feature index; `sae/README.md` says how it was made."""

from pathlib import Path


def embedded_sae_path() -> Path:
    """
    The folder of the embedded SAE: a Matryoshka SAE of 2,048 latents on layer 2 of the embedded language model, with
    statistics of its latents and a feature index.

    Returns:
        `Path`: What `AutoModel.from_pretrained` and `FeatureIndex.open` take.

    Raises:
        `FileNotFoundError`: If the installation lacks it.
    """
    folder = Path(__file__).parent / "sae"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"Expected the embedded SAE in {folder}, found none there. Reinstall the package.")
    return folder
