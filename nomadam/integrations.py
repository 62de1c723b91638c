"""SGDSaI in libraries that keep a list of optimizers by name."""

import importlib

_TOO_OLD = "register_timm needs timm 1.0.12 or newer ({}): pip install 'timm>=1.0.12'"


def register_timm() -> None:
    """Adds SGDSaI to timm's optimizers, as ``sgdsai``.

    ``timm.optim.create_optimizer_v2(model, "sgdsai", lr=1e-2)`` makes it then, with timm's groups
    (no decay of biases and norms, layer-wise rates), and so does ``--opt sgdsai`` of a training
    script that calls this first. Calling it again changes nothing. timm's groups carry no names:
    ``gains()`` counts the blocks.

    Raises:
        ImportError: where timm is not installed, or older than its list of optimizers (1.0.12), or
            lacks a package that it imports itself.

    Examples:
        >>> register_timm()  # doctest: +SKIP
        >>> timm.optim.create_optimizer_v2(model, "sgdsai", momentum=0.9)  # doctest: +SKIP
    """
    try:
        factory = importlib.import_module("timm.optim._optim_factory")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "timm":  # what timm imports is absent
            raise ImportError(f"timm could not be imported: {error}") from error
        raise ImportError(_TOO_OLD.format(error)) from error
    if not hasattr(factory, "list_optimizers"):
        raise ImportError(_TOO_OLD.format("it has no list_optimizers"))
    from nomadam.optimizers.sgd_sai import SGDSaI

    if "sgdsai" in factory.list_optimizers():
        return
    factory.default_registry.register(
        factory.OptimInfo(
            name="sgdsai",
            opt_class=SGDSaI,
            description="SGD with momentum, scaled once per tensor by its first gradient",
            has_momentum=True,
        )
    )
