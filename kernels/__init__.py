"""Array operations; see docs/architecture.md."""

# transformers looks for the hub's package of the same name and compares versions: this one is
# older than any it accepts, also where no installed distribution gives it a version.
__version__ = '0'
