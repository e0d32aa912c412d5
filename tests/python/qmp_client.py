# SPDX-License-Identifier: Apache-2.0 OR MIT
"""The Python package qemu.qmp as a client: every command, events, errors, descriptors, and coming back.

Usage: qmp_client.py SOCKET DISK NBD_SOCKET
"""
import asyncio
import os
import socket
import sys

from qemu.qmp import ExecuteError, QMPClient


async def refused(qmp, command, arguments, fragment):
    try:
        answer = await qmp.execute(command, arguments)
    except ExecuteError as error:
        assert fragment in str(error), (command, str(error))
        return
    raise AssertionError(f"{command} {arguments} answered {answer}")


async def main(path, disk, nbd):
    qmp = QMPClient("first")
    await qmp.connect(path)
    assert qmp.greeting.QMP.capabilities == ["oob"], qmp.greeting
    commands = {command["name"] for command in await qmp.execute("query-commands")}
    schema = await qmp.execute("query-qmp-schema")
    described = {entity["name"] for entity in schema if entity["meta-type"] == "command"}
    assert described == commands, described ^ commands
    tried = {"qmp_capabilities", "query-commands", "query-qmp-schema"}

    async def run(command, arguments=None):
        tried.add(command)
        return await qmp.execute(command, arguments or {})

    assert (await run("query-version"))["qemu"]["major"] == 10

    read_write = os.open(disk, os.O_RDWR)
    read_only = os.open(disk, os.O_RDONLY)
    qmp.send_fd_scm(read_write)
    added = await run("add-fd", {"fdset-id": 1, "opaque": "from Python"})
    assert added["fdset-id"] == 1, added
    qmp.send_fd_scm(read_only)
    await run("add-fd", {"fdset-id": 1})
    sets = await run("query-fdsets")
    assert [len(fdset["fds"]) for fdset in sets] == [2], sets
    await refused(qmp, "add-fd", {}, "No file descriptor supplied via SCM_RIGHTS")

    await run("blockdev-add", {"driver": "file", "node-name": "n", "filename": "/dev/fdset/1"})
    nodes = await run("query-named-block-nodes")
    assert nodes[0]["node-name"] == "n" and nodes[0]["ro"] is False, nodes
    options = {"driver": "file", "node-name": "n", "filename": "/dev/fdset/1", "read-only": True}
    await run("blockdev-reopen", {"options": [options]})
    assert (await run("query-named-block-nodes"))[0]["ro"] is True
    await refused(qmp, "blockdev-add", {"driver": "file", "node-name": "x", "filename": disk}, "opens no files")

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(nbd)
    listener.listen()
    qmp.send_fd_scm(listener.fileno())
    await run("getfd", {"fdname": "nbd"})
    await run("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "nbd"}}})
    await run("object-add", {"qom-type": "iothread", "id": "io"})
    await run("block-export-add", {"type": "nbd", "id": "e", "node-name": "n", "iothread": "io"})
    assert (await run("query-block-exports"))[0]["id"] == "e"
    with qmp.listener("BLOCK_EXPORT_DELETED") as deleted:
        await run("block-export-del", {"id": "e"})
        event = await deleted.get()
        assert event["data"] == {"id": "e"}, event
    await refused(qmp, "block_resize", {"node-name": "none", "size": 512}, "Cannot find device")
    for command, said in (
        ("blockdev-snapshot-internal-sync", "does not support internal snapshots"),
        ("blockdev-snapshot-delete-internal-sync", "Failed to get a snapshot list"),
    ):
        await refused(qmp, command, {"device": "n", "name": "s"}, said)
        tried.add(command)
    await refused(qmp, "blockdev-snapshot", {"node": "n", "overlay": "none"}, "Cannot find device='none'")
    await refused(qmp, "vvfat-changes", {"node": "n", "base": "n"}, "is no node with the driver vvfat")
    copy = {"job-id": "copy", "node": "n", "base": "n", "dir": "/dev/fdset/9"}
    await refused(qmp, "vvfat-copy", copy, "Failed to find fdset /dev/fdset/9")
    tried.update(("block_resize", "blockdev-snapshot", "vvfat-changes", "vvfat-copy"))
    for name in ("b", "c"):
        await run("block-dirty-bitmap-add", {"node": "n", "name": name})
    for verb in ("disable", "enable", "clear"):
        await run(f"block-dirty-bitmap-{verb}", {"node": "n", "name": "b"})
        tried.add(f"block-dirty-bitmap-{verb}")
    await run("block-dirty-bitmap-merge", {"node": "n", "target": "b", "bitmaps": ["c"]})
    await run("transaction", {"actions": [{"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "b"}}]})
    for name in ("b", "c"):
        await run("block-dirty-bitmap-remove", {"node": "n", "name": name})
    await run("nbd-server-add", {"device": "n"})
    await run("nbd-server-remove", {"name": "n"})
    await run("nbd-server-stop")
    await refused(qmp, "nbd-server-move", {"fd": "none"}, "NBD server not running")
    client = {"fd": "none", "export": "n", "style": "simple", "contexts": [], "received": ""}
    await refused(qmp, "nbd-client-add", client, "File descriptor named 'none' has not been found")
    tried.update(("nbd-server-move", "nbd-client-add"))
    for command in ("vhost-user-move", "vhost-user-client-add"):
        await refused(qmp, command, {"id": "e", "fd": "none"}, "File descriptor named 'none' has not been found")
        tried.add(command)
    assert (await run("query-block")) == []
    assert [node["node-name"] for node in (await run("query-blockstats", {"query-nodes": True}))] == ["n"]
    assert "exports" in (await run("query-statistics"))
    metrics = socket.socket(socket.AF_UNIX)
    metrics.bind(nbd + ".metrics")
    metrics.listen()
    qmp.send_fd_scm(metrics.fileno())
    await run("getfd", {"fdname": "metrics"})
    await run("metrics-server-start", {"addr": {"type": "fd", "data": {"str": "metrics"}}})
    await run("metrics-server-stop")
    await run("object-del", {"id": "io"})
    await refused(qmp, "blockdev-del", {"node-name": "none"}, "Failed to find node")
    tried.add("blockdev-nbd-reconnect")
    server = {"type": "fd", "str": "none"}
    await refused(qmp, "blockdev-nbd-reconnect", {"node-name": "none", "server": server}, "Failed to find node")
    await run("blockdev-del", {"node-name": "n"})

    with qmp.listener("JOB_STATUS_CHANGE") as status:
        job = {"job-id": "j", "options": {"driver": "file", "filename": "/dev/fdset/1", "size": 65536}}
        await run("blockdev-create", job)
        while (await status.get())["data"]["status"] != "concluded":
            pass
    jobs = await run("query-jobs")
    assert jobs[0]["status"] == "concluded" and "error" not in jobs[0], jobs
    await run("job-dismiss", {"id": "j"})
    for verb in ("job-cancel", "job-complete", "job-finalize", "job-pause", "job-resume"):
        await refused(qmp, verb, {"id": "j"}, "Job not found")
        tried.add(verb)

    qmp.send_fd_scm(read_only)
    await run("getfd", {"fdname": "spare"})
    await run("closefd", {"fdname": "spare"})
    await refused(qmp, "closefd", {"fdname": "spare"}, "File descriptor named 'spare' not found")
    layers = (await run("query-confinement", {"try": True}))
    assert all(attempt["denied"] for attempt in layers["attempts"]), layers
    assert any(entry["owner"] == "fdset" for entry in (await run("query-descriptors"))["descriptors"])

    # Away and back: sets are as they were.
    await qmp.disconnect()
    qmp = QMPClient("second")
    await qmp.connect(path)
    assert [fdset["fdset-id"] for fdset in await qmp.execute("query-fdsets")] == [1]
    tried.add("remove-fd")
    await qmp.execute("remove-fd", {"fdset-id": 1})
    assert await qmp.execute("query-fdsets") == []
    tried.add("quit")
    missed = commands - tried
    assert not missed, f"commands that this test does not run: {sorted(missed)}"
    await qmp.execute("quit")
    try:
        await qmp.disconnect()
    except EOFError:
        # The client was quicker to read that the daemon has hung up: the end that `quit` promises.
        pass


asyncio.run(asyncio.wait_for(main(*sys.argv[1:]), timeout=120))
print("every command was run")
