"""`just order`: writes `.cargo/hot.ld`, the order in which a release has the functions that each start runs.

Builds a release, runs it with a breakpoint at each of its functions, once without and once under a lease, and
notes which process first came to which function when. The linker's map says in which input section that
function lies; a line of `.cargo/hot.ld` is a pattern for such sections. Everything happens in a temporary
directory; the commands that are run are `/bin/true`. Needs Linux on x86_64, and root, as `just bench` does.
"""

import ctypes
import errno
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRUE = "/bin/true"

OPENING = """\
/* The functions that a start of `sublet` runs, next to each other: for the linker, by build.rs; made by
   `just order` ({count} patterns, {size} KiB). Without it all works the same, but each start costs more page
   faults: those functions lie all over 13 MB otherwise. A pattern that no longer finds anything is harmless.

   First what only the first process of a run executes, then what its children execute too, then what only
   they do: so each of them finds its own in one piece. */
"""


def main():
    with tempfile.TemporaryDirectory(prefix="sublet-order-") as place:
        place = Path(place)
        program, sections = build(place)
        entries = functions(program)
        runs = [trace(program, entries, command) for command in commands(program, place)]
        write(*order(sections, runs))


def build(place):
    """The release, with its symbols, and the input sections of its text: (address, size, name, file), sorted."""
    chart = place / "map"
    # The path of the map is new each time: it is linked again.
    command = ["cargo", "rustc", "--release", "--bin", "sublet", "--message-format=json-render-diagnostics"]
    command += ["--", "-C", "strip=none", "-C", f"link-arg=-Wl,-Map={chart}"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    made = [json.loads(line).get("executable") for line in lines if line.startswith("{")]
    program = place / "sublet"
    program.write_bytes(Path([path for path in made if path][-1]).read_bytes())
    program.chmod(0o755)
    return program, text_of(chart.read_text(errors="replace"))


def text_of(chart):
    """The input sections of the text, from a linker's map."""
    # LLD: address, load address, size, alignment, file:(section). GNU: section, address, size, file.
    lld = re.findall(r"^ *([0-9a-f]+) +[0-9a-f]+ +([0-9a-f]+) +\d+ +(.+):\((\.text\S*)\)$", chart, re.M)
    gnu = re.findall(r"^ (\.text\S*)\s+0x([0-9a-f]+)\s+0x([0-9a-f]+) (.+)$", chart, re.M)
    rows = [(address, size, name, file) for address, size, file, name in lld]
    rows += [(address, size, name, file) for name, address, size, file in gnu]
    rows = [(int(address, 16), int(size, 16), name, file) for address, size, name, file in rows]
    # GNU lists what it left out, too, at no address.
    return sorted(row for row in rows if row[0] and row[1])


def functions(program):
    """The addresses of the functions of an ELF file of 64 bits."""
    image = program.read_bytes()
    at, = struct.unpack_from("<Q", image, 0x28)
    size, count = struct.unpack_from("<HH", image, 0x3A)
    found = set()
    for header in range(count):
        _, kind, _, _, offset, length = struct.unpack_from("<IIQQQQ", image, at + header * size)
        if kind != 2:  # SHT_SYMTAB
            continue
        for _, info, _, section, value, _ in struct.iter_unpack("<IBBHQQ", image[offset:offset + length]):
            # STT_FUNC, STT_GNU_IFUNC; and it is in a section of the file.
            if info & 15 in (2, 10) and 0 < section < 0xFF00:
                found.add(value)
    return sorted(found)


def commands(program, place):
    """Starts as they are day by day: the state is there, and has a secret."""
    work = place / "work"
    work.mkdir()
    config = place / "sublet.toml"
    config.write_text('[secrets.s]\nsource = "vault"\nallow = ["order.use@svc.test"]\n')
    profile = place / "order.toml"
    profile.write_text(
        'extends = "default"\n[[capability]]\nname = "order.use"\nchannels = ["memfd"]\ncommand = [["**"]]\n'
        '[[capability.audience]]\nprotocol = "https"\nhost = "svc.test"\nsecret = "s"\nvariable = "TOKEN"\n'
    )
    os.chdir(work)
    for name in [name for name in os.environ if name.startswith("SUBLET_")]:
        del os.environ[name]
    os.environ["HOME"] = str(place)
    sublet = [str(program), "--config", str(config), "--state-dir", str(place / "state")]
    subprocess.run([*sublet, "secret", "set", "s"], input=b"a-value-of-the-usual-length-0123456789", check=True)
    plain = [*sublet, "run", "--", TRUE]
    leased = [*sublet, "run", "--profile", str(profile), "--lease", "order.use@svc.test", "--", TRUE]
    for command in (plain, leased):
        subprocess.run(command, check=True)
    return [plain, leased]


# sys/ptrace.h, sys/personality.h, elf.h
TRACEME, CONT, GETREGS, SETREGS, DETACH, SETOPTIONS, GETEVENTMSG = 0, 7, 12, 13, 17, 0x4200, 0x4201
FORK, VFORK, CLONE, EXEC = 1, 2, 3, 4
OPTIONS = 1 << FORK | 1 << VFORK | 1 << CLONE | 1 << EXEC | 1 << 20  # PTRACE_O_EXITKILL
ADDR_NO_RANDOMIZE = 0x0040000
AT_ENTRY = 9
WALL = 0x40000000
RIP = 16  # of the 27 words of user_regs_struct

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.restype = ctypes.c_long
LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def ptrace(request, pid, data=None):
    if LIBC.ptrace(request, pid, None, data) < 0:
        # A process that was killed meanwhile is waited for next.
        if ctypes.get_errno() != errno.ESRCH:
            raise OSError(ctypes.get_errno(), f"ptrace {request} of {pid}")


def trace(program, entries, command):
    """Which processes, by birth, came to which functions, and to how many before: {address: {process: rank}}."""
    image = program.read_bytes()
    entry, = struct.unpack_from("<Q", image, 0x18)
    low, high = entries[0], entries[-1] + 1
    first = os.fork()
    if first == 0:
        LIBC.personality(ADDR_NO_RANDOMIZE)
        LIBC.ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.execv(command[0], command)
    os.waitpid(first, 0)
    ptrace(SETOPTIONS, first, OPTIONS)
    ptrace(CONT, first)
    base, clean, seeded = None, None, None
    born, ranks, reached = {first: 0}, Counter(), {}
    registers = (ctypes.c_ulonglong * 27)()
    own = os.stat(program)

    def seed(pid):
        nonlocal base, clean, seeded
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            if seeded is None:
                words = struct.iter_unpack("<QQ", Path(f"/proc/{pid}/auxv").read_bytes())
                base = dict(words)[AT_ENTRY] - entry
                memory.seek(base + low)
                clean = memory.read(high - low)
                seeded = bytearray(clean)
                for address in entries:
                    seeded[address - low] = 0xCC  # int3
            memory.seek(base + low)
            memory.write(seeded)

    while True:
        try:
            pid, status = os.waitpid(-1, WALL)
        except ChildProcessError:
            break
        if not os.WIFSTOPPED(status):
            if pid == first and status != 0:
                sys.exit(f"{command}: status {status:#x}")
            continue
        stopped_by, event, pass_on = os.WSTOPSIG(status), status >> 16, None
        if event == EXEC:
            ran = os.stat(f"/proc/{pid}/exe")
            if (ran.st_dev, ran.st_ino) != (own.st_dev, own.st_ino):
                ptrace(DETACH, pid)
                continue
            seed(pid)
        elif event in (FORK, VFORK, CLONE):
            child = ctypes.c_ulong()
            ptrace(GETEVENTMSG, pid, ctypes.addressof(child))
            born.setdefault(child.value, len(born))
        elif stopped_by == signal.SIGSTOP:
            # A child's first stop: what its parent came to must be noted of it again.
            born.setdefault(pid, len(born))
            seed(pid)
        elif stopped_by == signal.SIGTRAP:
            ptrace(GETREGS, pid, ctypes.addressof(registers))
            address = registers[RIP] - 1 - base
            if low <= address < high and seeded[address - low] == 0xCC:
                process = born[pid]
                reached.setdefault(address, {}).setdefault(process, ranks[process])
                ranks[process] += 1
                with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
                    memory.seek(base + address)
                    memory.write(clean[address - low:address - low + 1])
                registers[RIP] -= 1
                ptrace(SETREGS, pid, ctypes.addressof(registers))
        else:
            pass_on = stopped_by
        ptrace(CONT, pid, pass_on)
    return reached


def order(sections, runs):
    """The patterns in the order of their sections, and how many bytes they find."""
    starts = [address for address, *_ in sections]
    rows = {}
    for number, run in enumerate(runs):
        for address, ranks in run.items():
            start, size, name, file = sections[bisect_right(starts, address) - 1]
            wanted = pattern(name, file) if start <= address < start + size else None
            if wanted:
                seen = rows.setdefault(wanted, {})
                for process, rank in ranks.items():
                    seen[process] = min(seen.get(process, (number, rank)), (number, rank))

    def place(row):
        wanted, seen = row
        first, last = min(seen), max(seen)
        # Of one process: what several do at once comes in another order each time.
        number, rank = seen[first]
        # What only a lease needs stands before all that the first process has of every start.
        return first, last if number == 0 or first > 0 else -1, number, rank, wanted

    ordered = [wanted for wanted, _ in sorted(rows.items(), key=place)]
    found = sum(size for _, size, name, file in sections if pattern(name, file) in rows)
    return ordered, found


def pattern(name, file):
    """What finds this input section in builds by other compilers and linkers too, or `None`: a section of
    many functions, in an object without a lasting name."""
    member = re.search(r"libc\.a[(:]([^()]+\.o)\)?$", file)
    if member:
        return f"*libc.a:{member[1]}(.text .text.*)"
    if re.fullmatch(r"\.text(\.(unlikely|startup|hot|exit))?", name):
        return None
    # Hashes of crates, of types, and of units of optimisation; versions.
    name = re.sub(r"17h[0-9a-f]{16}E.*", "17h*", name)
    name = re.sub(r"Cs[0-9A-Za-z]+_(?=[0-9])", "Cs*_", name)
    name = re.sub(r"\.llvm\.[0-9]+$", "*", name)
    name = re.sub(r"aws_lc_[0-9]+_[0-9]+_[0-9]+_", "aws_lc_*_", name)
    # Whether gcc makes such a variant of a function is up to its version.
    plain = re.sub(r"(\.(isra|constprop|part)\.[0-9]+)+$", "", name)
    return f"*({name})" if plain == name else f"*({plain} {plain}.*)"


def write(ordered, found):
    lines = "".join(f"    {line}\n" for line in ordered)
    opening = OPENING.format(count=len(ordered), size=found // 1024)
    body = f"SECTIONS {{\n  .text.hot : {{\n{lines}  }}\n}}\nINSERT BEFORE .text;\n"
    (ROOT / ".cargo/hot.ld").write_text(opening + body)
    print(f".cargo/hot.ld: {len(ordered)} patterns, {found // 1024} KiB")


if __name__ == "__main__":
    main()
