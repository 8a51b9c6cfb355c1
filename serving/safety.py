"""Checks of prompts and pictures: what they find is refused, in each dialect's own shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from serving.errors import RequestError
from training.errors import UsageError


@dataclass(frozen=True)
class Finding:
    """Why something is refused.

    Attributes:
        rule: the check's rule, without the words of the prompt.
        score: what it measured, 0..1; None where it measures nothing.
    """

    rule: str
    score: float | None = None


PromptCheck = Callable[[str], Finding | None]
"""What a prompt is refused for; threads may call it at once."""
ImageCheck = Callable[[Image.Image], Finding | None]
"""What an RGB picture is refused for; threads may call it at once."""


class SafetyError(RequestError):
    """A check refuses the prompt, or the picture that came of it."""

    code = "content_policy_violation"


def allow(_: object) -> None:
    """The check that finds nothing."""


@dataclass(frozen=True)
class Safety:
    """Both checks.

    Attributes:
        prompts: of prompts.
        images: of pictures.
    """

    prompts: PromptCheck = allow
    images: ImageCheck = allow

    def check_prompt(self, prompt: str) -> None:
        """Refuse what the prompt's check finds.

        Raises:
            SafetyError: naming the rule.
        """
        _refuse("This prompt is not allowed.", self.prompts(prompt), mend="ask for something else")

    @property
    def looks_at_prompts(self) -> bool:
        """Whether a prompt can be refused at all."""
        return self.prompts is not allow

    @property
    def looks_at_images(self) -> bool:
        """Whether a picture can be refused at all."""
        return self.images is not allow

    def allows(self, image: Image.Image) -> bool:
        """Whether the picture's check finds nothing."""
        return self.images(image) is None

    def check_picture(self, image: Image.Image) -> None:
        """Refuse what the picture's check finds.

        Raises:
            SafetyError: naming the rule.
        """
        _refuse(
            "The picture that came of this prompt is not allowed.",
            self.images(image),
            mend="another seed or another prompt",
        )


def _refuse(message: str, found: Finding | None, *, mend: str) -> None:
    if found is None:
        return
    value = None if found.score is None else round(found.score, 3)
    raise SafetyError(UsageError(message, value=value, rule=found.rule, mend=mend), param="prompt")
