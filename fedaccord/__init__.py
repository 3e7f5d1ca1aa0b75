"""Federated learning inside limits that the sites agreed on, on Flower, Opacus and Fairlearn.

The rooms ``client``, ``fairness``, ``models``, ``privacy``, ``reports``, ``server``,
``simulations`` and ``strategies`` stand at the repository root; a wheel holds them inside this
package. Import them as ``fedaccord.privacy``, never as ``privacy``.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"  # as in pyproject.toml; a bundle has no package metadata to read it from

_here = _Path(__file__).resolve().parent
if not (_here / "strategies").is_dir():  # a Flower App Bundle, or a checkout without symlinks
    __path__.append(str(_here.parent))
