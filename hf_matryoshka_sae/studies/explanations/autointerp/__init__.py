"""Automated interpretability: latents explained by a language model, and the explanations examined on other text."""

from .answers import AnswerCache, Cost, Judge, Reply
from .endpoint import EndpointJudge
from .examination import Interpreted, PassageCounts
from .interpretability import automated_interpretability, greet
from .judges import ChatModelJudge, open_judge


__all__ = [
    "AnswerCache",
    "ChatModelJudge",
    "Cost",
    "EndpointJudge",
    "Interpreted",
    "Judge",
    "PassageCounts",
    "Reply",
    "automated_interpretability",
    "greet",
    "open_judge",
]
