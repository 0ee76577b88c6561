"""Objects that behave like another one but for a method, without changing it."""


def subclass(cls: type, **members) -> type:
    """A subclass under the same name, so that files saved meanwhile name the class they should.

    Copies and pickles of its instances are of the original class.
    """

    def reduced(instance, protocol):
        return _with_attributes(cls, instance).__reduce_ex__(protocol)

    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": reduced}
    return type(cls.__name__, (cls,), members)


class Overlay:
    """Other methods for objects, to turn on and off any number of times; off when made.

    The classes are made once, so graphs that were compiled with them are found again. Where something else changed the
    class of an object meanwhile and gives ours back after its end, our methods are there but should do nothing: they ask
    ``active``.

    Args:
        methods: by object, methods by name.

    Attributes:
        active: whether it is on.
    """

    def __init__(self, methods: dict):
        self.active = False
        self._classes = [(one, type(one), subclass(type(one), **members)) for one, members in methods.items()]

    def on(self) -> None:
        """Give every object its other methods."""
        if not self.active:
            self.active = True
            for one, former, ours in self._classes:
                if type(one) is former:
                    one.__class__ = ours

    def off(self) -> None:
        """Give every object its class back; one that has another class by now keeps that."""
        self.active = False
        for one, former, ours in self._classes:
            if type(one) is ours:
                one.__class__ = former


def stand_in(instance, **methods):
    """An object that shares its attributes with ``instance``, both ways, and has other methods."""
    return _with_attributes(subclass(type(instance), **methods), instance)


def _with_attributes(cls: type, instance):
    double = object.__new__(cls)
    object.__setattr__(double, "__dict__", instance.__dict__)
    return double


def retire(double, instance) -> None:
    """Make a stand-in, to which hooks of offloading and caching may still refer, the like of what it stood in for."""
    object.__setattr__(double, "__class__", type(instance))
    registry = instance.__dict__.get("_diffusers_hook")
    if getattr(registry, "_module_ref", None) is double:
        registry._module_ref = instance
