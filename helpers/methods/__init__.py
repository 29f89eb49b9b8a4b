"""A method a file. All of them are imported with the package, so `Method.known` has every one by its name."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
