"""What a checkpoint holds, back into an engine."""

from __future__ import annotations

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.errors import UserError
from genscale.parallel.dealing import dealt
from genscale.parallel.engine import Engine


def load_beside_weights(engine: Engine, checkpoint: Checkpoint) -> None:
    """Optimizers, loss scalers and averages as in the checkpoint, whose weights the networks have. Collective: each process
    reads a part of the tensors for all.

    Raises:
        UserError: a weight is infinite or not a number: no update could follow.
    """
    scalers = checkpoint.state()["scalers"]
    for name in engine.optimizers:
        stored = checkpoint.tensors("optimizers", name)
        engine.load_optimizer_state(name, stored.keys(), dealt(stored, stored.shapes(), engine.processes))
        engine.load_scaler_state(name, scalers.get(name, {}))
    for name in engine.averages:
        stored = checkpoint.tensors("averages", name)
        engine.load_average_state(name, stored.keys(), dealt(stored, stored.shapes(), engine.processes))
    if not engine.weights_are_finite():
        raise UserError(f"{checkpoint.path}: it holds a weight that is infinite or no number, from which no training goes on; "
                        "delete this checkpoint to go on from the one before it")


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Take an engine that has trained on back to the checkpoint: networks with their averaged weights, where it has an average,
    or their own. Collective."""
    for name in engine.optimizers:
        engine.load_network_state(name, checkpoint.weights(name, averaged=True))
    load_beside_weights(engine, checkpoint)


def restore_exactly(engine: Engine, checkpoint: Checkpoint) -> None:
    """The same with every network's own weights: the engine is then as it was when the checkpoint was written. Collective."""
    for name in engine.optimizers:
        engine.load_network_state(name, checkpoint.tensors("networks", name))
        engine.clear_optimizer_state(name)
    load_beside_weights(engine, checkpoint)
