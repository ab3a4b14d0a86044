"""Parts of ``llamamoe mix``: recipe, plan, checks of the models, experts, verification."""
