"""Turn a trained dense LLaMA-style language model into a sparse mixture of experts that plain transformers loads.

    import llamamoe

    recipe = llamamoe.load_recipe(given={"num_experts": 8, "top_k": 2, "method": "kmeans"})
    llamamoe.split("path/to/dense", "path/to/moe", recipe)

Importing this package imports neither torch nor transformers; its names, listed in ``__init__.pyi``, are resolved on
first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
