"""Parts of ``llamamoe resplit``: its recipe, and the pieces that are selected one by one."""
