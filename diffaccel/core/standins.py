"""Objects that behave like another one but for a method, without changing it."""


def subclass(cls: type, **members) -> type:
    """A subclass under the same name, so that files saved meanwhile name the class they should.

    Copies and pickles of its instances are of the original class.
    """

    def reduced(instance, protocol):
        return _with_attributes(cls, instance).__reduce_ex__(protocol)

    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": reduced}
    return type(cls.__name__, (cls,), members)


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
