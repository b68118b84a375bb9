from __future__ import annotations

from dassl.utils import Registry

from dfzsl.utils.dassl_plugin import register


def named(name: str) -> type:
    return type(name, (), {})


def test_a_trainer_of_the_checkout_stays_and_its_data_set_is_replaced():
    registry = Registry("THINGS")
    theirs, ours = named("CoOp"), named("CoOp")
    registry.register(theirs)
    register(registry)(ours)
    assert registry.get("CoOp") is theirs
    register(registry, replace=True)(ours)
    assert registry.get("CoOp") is ours


def test_a_new_name_is_registered():
    registry = Registry("THINGS")
    mine = register(registry)(named("Mine"))
    assert registry.get("Mine") is mine
