# SPDX-License-Identifier: Apache-2.0 OR MIT
"""What readers that share no code with QEMU or with us find in an image.

Usage: readers.py FORMAT IMAGE DISK [EXTENT...]

Prints one line for each reader that knows the format: its name, and `same` if it reads what is in DISK, perhaps followed by zeroes,
`other` if it reads anything else, or `-` and why it does not read this image. EXTENTs are the image's other files, in order; of a
VHD, its parent.
"""

import pathlib
import sys

LIMIT = 64 << 20


def content(stream, size):
    assert size <= LIMIT, f"{size} bytes"
    data = bytearray()
    while len(data) < size:
        piece = stream.read(size - len(data))
        assert piece, f"ends after {len(data)} of {size} bytes"
        data += piece
    return data


def dissect(kind, path, files):
    from dissect.hypervisor.disk import qcow2, vdi, vhd, vmdk

    if kind == "qcow2":
        data_file = open(files[0], "rb") if files else None
        disk = qcow2.QCow2(open(path, "rb"), data_file=data_file)
    elif kind == "vdi":
        disk = vdi.VDI(open(path, "rb"))
    elif kind == "vpc":
        if files:
            raise LookupError
        disk = vhd.VHD(open(path, "rb"))
    else:
        disk = vmdk.VMDK([pathlib.Path(name) for name in files or [path]])
    return content(disk.open() if kind in ("qcow2", "vdi") else disk, disk.size)


def libyal(kind, path, files):
    if kind == "qcow2":
        import pyqcow

        disk = pyqcow.file()
    elif kind == "vpc":
        import pyvhdi

        disk = pyvhdi.file()
    elif kind == "vmdk":
        import pyvmdk

        disk = pyvmdk.handle()
    else:
        raise LookupError
    disk.open(path)
    if kind == "vpc" and files:
        parent = pyvhdi.file()
        parent.open(files[0])
        disk.set_parent(parent)
    if kind == "vmdk":
        disk.open_extent_data_files_as_file_objects([open(name, "rb") for name in files or [path]])
    return content(type("Stream", (), {"read": lambda _, n: disk.read_buffer(n)})(), disk.get_media_size())


def main():
    kind, path, disk, *files = sys.argv[1:]
    disk = pathlib.Path(disk).read_bytes()
    for name, reader in (("dissect", dissect), ("libyal", libyal)):
        try:
            data = reader(kind, path, files)
            print(name, "same" if data == disk.ljust(len(data), b"\0") else "other", len(data))
        except LookupError:
            pass
        except Exception as e:  # Whatever a reader fails with is its answer.
            print(name, "-", f"{type(e).__name__}: {e}".replace("\n", " "))


main()
