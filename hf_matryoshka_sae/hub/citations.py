"""Whom to cite for an SAE: the papers behind its family."""

from ..models import SAEConfig


_MATRYOSHKA = """\
@misc{bussmann2025matryoshka,
  title = {Learning Multi-Level Features with Matryoshka Sparse Autoencoders},
  author = {Bussmann, Bart and Nabeshima, Noa and Karvonen, Adam and Nanda, Neel},
  year = {2025},
  eprint = {2503.17547},
  archivePrefix = {arXiv}
}"""
_NABESHIMA = """\
@misc{nabeshima2024matryoshka,
  title = {Matryoshka Sparse Autoencoders},
  author = {Nabeshima, Noa},
  year = {2024},
  howpublished = {LessWrong},
  url = {https://www.lesswrong.com/posts/zbebxYCqsryPALh8C}
}"""
_TOPK = """\
@misc{gao2024scaling,
  title = {Scaling and evaluating sparse autoencoders},
  author = {Gao, Leo and Dupr\\'e la Tour, Tom and Tillman, Henk and Goh, Gabriel and Troll, Rajan and
            Radford, Alec and Sutskever, Ilya and Leike, Jan and Wu, Jeffrey},
  year = {2024},
  eprint = {2406.04093},
  archivePrefix = {arXiv}
}"""
_BATCH_TOPK = """\
@misc{bussmann2024batchtopk,
  title = {BatchTopK Sparse Autoencoders},
  author = {Bussmann, Bart and Leask, Patrick and Nanda, Neel},
  year = {2024},
  eprint = {2412.06410},
  archivePrefix = {arXiv}
}"""
_JUMPRELU = """\
@misc{rajamanoharan2024jumprelu,
  title = {Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders},
  author = {Rajamanoharan, Senthooran and Lieberum, Tom and Sonnerat, Nicolas and Conmy, Arthur and
            Varma, Vikrant and Kram\\'ar, J\\'anos and Nanda, Neel},
  year = {2024},
  eprint = {2407.14435},
  archivePrefix = {arXiv}
}"""
_GATED = """\
@misc{rajamanoharan2024gated,
  title = {Improving Dictionary Learning with Gated Sparse Autoencoders},
  author = {Rajamanoharan, Senthooran and Conmy, Arthur and Smith, Lewis and Lieberum, Tom and
            Varma, Vikrant and Kram\\'ar, J\\'anos and Shah, Rohin and Nanda, Neel},
  year = {2024},
  eprint = {2404.16014},
  archivePrefix = {arXiv}
}"""
_RELU = """\
@article{bricken2023monosemanticity,
  title = {Towards Monosemanticity: Decomposing Language Models With Dictionary Learning},
  author = {Bricken, Trenton and Templeton, Adly and Batson, Joshua and Chen, Brian and Jermyn, Adam and
            Conerly, Tom and others},
  year = {2023},
  journal = {Transformer Circuits Thread},
  url = {https://transformer-circuits.pub/2023/monosemantic-features}
}"""
_PROGRESSIVE = """\
@misc{peter2025progressive,
  title = {Empirical Evaluation of Progressive Coding for Sparse Autoencoders},
  author = {Peter, Hans and S{\\o}gaard, Anders},
  year = {2025},
  eprint = {2505.00190},
  archivePrefix = {arXiv}
}"""

_ACTIVATIONS = {
    "relu": [_RELU],
    "topk": [_TOPK],
    "batch_topk": [_BATCH_TOPK, _TOPK],  # AuxK, with which dead latents are revived, is of the second
    "jumprelu": [_JUMPRELU],
    "gated": [_GATED],
}


def citations(configs: list[SAEConfig], progressive: bool = False) -> list[str]:
    """Return BibTeX entries of the papers behind some SAEs, each once.

    Args:
        configs (`list[SAEConfig]`): Configs of the SAEs.
        progressive (`bool`, *optional*, defaults to `False`): Whether the card shows progressive curves or power laws.
    """
    entries: list[str] = []
    for config in configs:
        entries += [_MATRYOSHKA, _NABESHIMA] if config.model_type == "matryoshka_sae" else []
        entries += _ACTIVATIONS.get(config.activation_name, [])
    return list(dict.fromkeys(entries + [_PROGRESSIVE] * progressive))
