"""One line on the adapter of a box, for those who look after it."""

from typing import TYPE_CHECKING

from fedpeft.errors import AdapterError, UnknownAdapter

if TYPE_CHECKING:
    from fedpeft_client.box import Box


def adapter_line(box: "Box") -> str:
    """Say which version answers on a box, and why the newest one does not if that is so.

    Raises:
        StorageError: the store cannot be read.
    """
    store = box.adapter_store
    name, versions = store.in_use_name(), store.versions()
    try:
        found = store.in_use()
        if found is not None:
            found.require_intact()
    except (AdapterError, UnknownAdapter) as error:
        return f"adapter\tPROBLEM: {error}"
    line = f"adapter\t{name} in use"
    if not versions:
        return f"{line}, as none has come yet"
    newest = versions[-1]
    if newest.name == name:
        return f"{line} since {newest.about.received}: {newest.verdict.reason}"
    if newest.verdict.accepted:
        return f"{line}; the newest is {newest.name}, people chose another"
    return f"{line}; the newest, {newest.name}, was not taken: {newest.verdict.reason}"
