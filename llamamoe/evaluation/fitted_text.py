"""Warn of text that a model is measured on although its weights were fitted to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..calibration.reading import FITTED, shared_documents
from ..checkpoint.receipts import documents_fitted_to
from ..data.text import Document
from ..models.loading import Opened


def fitted_text_warnings(sides: Sequence[Opened], documents: Sequence[Document]) -> Iterator[str]:
    """Yield a warning about each model whose receipts hold the hash of one of the documents.

    Args:
        sides: The models; nothing is known of a GGUF file.
        documents: Those that the models are measured on.
    """
    for side in sides:
        folders = [Path(side.options["pretrained_model_name_or_path"])] if side.dense is None else []
        used = set(documents_fitted_to(*folders))
        both = shared_documents(used, documents) if used else ()
        if both:
            yield (
                f"{side.name} was fitted to {len(both):,} of the {len(documents):,} documents that it is measured on, such as one in "
                f"{both[0]}, and {FITTED}: measure on documents that were not used for its calibration."
            )
