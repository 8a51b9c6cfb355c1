"""What a picture must be to be kept: one section for each family of rules."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from training.data.clean.captions import CaptionConfig
from training.data.clean.consent import ConsentConfig
from training.data.clean.content import ContentConfig
from training.data.clean.decoding import DecodingConfig
from training.data.clean.duplicates import DuplicatesConfig
from training.data.clean.match import MatchConfig
from training.data.clean.outliers import OutlierConfig
from training.data.clean.size import SizeConfig
from training.data.clean.unsafe import UnsafeConfig


class CleanConfig(BaseModel):
    """What a picture must be to be kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: SizeConfig = SizeConfig()
    """Bytes, pixels, sides, shape."""
    decoding: DecodingConfig = DecodingConfig()
    """Damage and bombs."""
    content: ContentConfig = ContentConfig()
    """Near-uniform and blurred pictures."""
    captions: CaptionConfig = CaptionConfig()
    """How captions are cleaned."""
    consent: ConsentConfig = ConsentConfig()
    """Licences and opt-outs."""
    duplicates: DuplicatesConfig = DuplicatesConfig()
    """Copies."""
    unsafe: UnsafeConfig = UnsafeConfig()
    """Pornography."""
    outliers: OutlierConfig = OutlierConfig()
    """Pictures unlike all others."""
    match: MatchConfig = MatchConfig()
    """Captions of something else."""
