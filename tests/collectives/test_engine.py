"""The engine's own rules, apart from what it computes."""

from types import SimpleNamespace

from collectives.engine import Engine
from transports.inproc import inproc_group


class CompletedMeanwhile:
    """A request that another thread completes just after it was asked for the first time."""

    asked = 0

    @property
    def done(self):
        self.asked += 1
        return self.asked > 1


def test_a_message_that_lands_while_the_engine_looks_is_not_lost(monkeypatch):
    completed = []
    monkeypatch.setattr(Engine, "_complete", lambda _engine, _execution, index: completed.append(index))
    engine = Engine(inproc_group(1)[0])
    execution = SimpleNamespace(flying=[(SimpleNamespace(done=True), 0, None), (CompletedMeanwhile(), 1, None)])
    assert engine._reap(execution)
    assert completed == [0]
    assert engine._reap(execution)
    assert completed == [0, 1]
