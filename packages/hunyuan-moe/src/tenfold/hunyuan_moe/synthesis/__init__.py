"""The paper's four steps of data synthesis, over a local model or a server."""

from .generators import Generate, LocalModel, Server
from .pipeline import Critique, Evolve, Instruct, Respond, select

__all__ = ["Critique", "Evolve", "Generate", "Instruct", "LocalModel", "Respond", "Server", "select"]
