"""Open the tokens of a run: training and held-out ones."""

from __future__ import annotations

from ..data.shards import TokenCorpus
from ..data.token_index import VALIDATION, read_index
from ..errors import UsageError
from .places import of_key
from .recipe_parts import DataRecipe


def training_corpus(recipe: DataRecipe) -> TokenCorpus:
    """Return the training tokens."""
    with of_key("data.train", "--set data.train=FOLDER"):
        return TokenCorpus(recipe.train)


def held_out_corpus(recipe: DataRecipe) -> TokenCorpus | None:
    """Return the held-out tokens: the held-out split of the named or training folder, or the whole other folder.

    Raises:
        UsageError: It is the training text.
    """
    train = training_corpus(recipe)
    if recipe.validation is None:
        return TokenCorpus(train.folder, VALIDATION) if VALIDATION in train.index.splits else None
    with of_key("data.validation", "--set data.validation=FOLDER (or null)"):
        found = TokenCorpus(recipe.validation)
    if found.split != VALIDATION and VALIDATION in read_index(found.folder).splits:
        found = TokenCorpus(found.folder, VALIDATION)
    if found.fingerprint == train.fingerprint:
        raise UsageError(
            "data.validation is the text of data.train, so its loss would be meaningless.",
            hint="Hold documents out with `validation: {share: 0.01}` in the recipe of llamamoe tokenize.",
        )
    return found


def separator_of(data: DataRecipe, corpus: TokenCorpus) -> int | None:
    """Return the token that ends a document where documents are kept apart; None where they are joined."""
    return corpus.index.eos_token_id if data.documents == "apart" else None
