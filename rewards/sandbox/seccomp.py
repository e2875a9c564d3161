"""The seccomp filter: BPF that says which system calls a program may make, assembled here.

Most calls are allowed, as Python and compilers use many. Refused are: what leaves or makes namespaces, touches other processes, makes
sockets (Landlock does not stop connect() to a Unix socket with a path), takes memory that no limit counts, asks the kernel for
keys, BPF, io_uring, modules, clocks; and every call that is newer than this list. Numbers are of x86_64 and of aarch64.
"""

import struct
from functools import cache

KILL, ALLOW, ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NR, _ARCH, _ARGUMENTS = 0, 4, 16
_NEWEST = 462
"""mseal, Linux 6.10. What is newer does not exist for a program."""
_CLONE_REFUSED = 0x7E020000 | 0x00800000
"""CLONE_NEW* (CLONE_NEWTIME exists for clone3 and unshare alone), and CLONE_UNTRACED, which would leave a tracer."""

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the numbers below, AUDIT_ARCH."""

REFUSED = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "kcmp": (312, 272), "pidfd_getfd": (438, 438), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "ioprio_set": (251, 30), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    # namespaces, mounts, identity
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "statmount": (457, 457), "listmount": (458, 458), "unshare": (272, 97), "setns": (308, 268),
    "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setregid": (114, 143), "setresuid": (117, 147),
    "setresgid": (119, 149), "setgroups": (116, 159), "setfsuid": (122, 151), "setfsgid": (123, 152), "capset": (126, 91),
    "mknod": (133, None), "mknodat": (259, 33), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # sockets and System V or POSIX messages, which outlive a process
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242),
    "sendmsg": (46, 211), "sendmmsg": (307, 269),  # with which descriptors could be parked where nobody counts them
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "shmdt": (67, 197), "semget": (64, 190), "semop": (65, 193),
    "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181), "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183), "mq_notify": (244, 184), "mq_getsetattr": (245, 185),
    # memory that is a file outside the temporary folder
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "vmsplice": (278, 75),
    # the kernel
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "personality": (135, 92),
    "lookup_dcookie": (212, 18), "vhangup": (153, 58), "uselib": (134, None), "ustat": (136, None), "sysfs": (139, None),
    "_sysctl": (156, None), "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "seccomp": (317, 277),
    "nfsservctl": (180, 42), "remap_file_pages": (216, 234),
    "io_setup": (206, 0),  # its contexts are counted for the whole machine
}  # fmt: skip

METADATA = {
    "chmod": (90, None), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "lchown": (94, None),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "removexattr": (197, 14), "lremovexattr": (198, 15),
    # by a descriptor, for which one that may only read is enough
    "fchmod": (91, 52), "fchown": (93, 55), "fsetxattr": (190, 7), "fremovexattr": (199, 16),
}  # fmt: skip
"""What Landlock lets a program do to any file of its user. Without a mount namespace they do nothing and say 0."""

_SYNC = {"sync": (162, 81), "syncfs": (306, 267)}
"""They would make every disk of the machine write, as often as a program likes. They do nothing and say 0."""

_CLONE, _CLONE3, _SOCKETPAIR, _PRLIMIT, _AFFINITY = (56, 220), (435, 435), (53, 199), (302, 261), (203, 122)
_PRIORITY, _IOCTL, _PRCTL = (141, 140), (16, 29), (157, 167)
_SIGNALS = [(62, 129), (200, 130), (234, 131), (129, 138), (297, 240)]
"""kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo."""
_PIDFD_SIGNAL = (424, 424)
_PRCTL_REFUSED = (4, 22, 35, 36)
"""PR_SET_DUMPABLE, which would close its descriptors to the server; PR_SET_SECCOMP, PR_SET_MM, PR_SET_CHILD_SUBREAPER."""
_IOCTL_REFUSED = (0x5412, 0x541C, 0x8901, 0x8902)
"""TIOCSTI and TIOCLINUX, which type into a terminal; FIOSETOWN and SIOCSPGRP, as F_SETOWN."""
_FCNTL, _FCNTL_REFUSED = (72, 25), (8, 10, 15)
"""F_SETOWN, F_SETSIG, F_SETOWN_EX: with them the kernel sends signals in a program's name."""


@cache
def filter_program(machine: str, shared_files: bool = False, signals_only_to: int | None = None) -> bytes:
    """The filter as an array of struct sock_filter.

    `shared_files`: the program sees the machine's files, so their metadata are kept from it. `signals_only_to`: a process id, where
    neither a namespace nor Landlock keeps signals from others.
    """
    column, arch = MACHINES[machine]
    code = [_op(_LOAD, _ARCH), _op(_EQUAL, arch, 1, 0), _op(_RETURN, KILL), _op(_LOAD, _NR)]
    code += [_op(_AT_LEAST, _NEWEST + 1, 0, 1), _op(_RETURN, ERRNO | _ENOSYS)]  # x32's numbers are above as well
    # ENOSYS, or glibc would not go back to clone, whose flags can be read here.
    rules = {_CLONE3: ERRNO | _ENOSYS} | dict.fromkeys(REFUSED.values(), ERRNO | _EPERM) | dict.fromkeys(_SYNC.values(), ERRNO)
    if shared_files:
        rules |= dict.fromkeys(METADATA.values(), ERRNO)
    for numbers, answer in rules.items():
        if (number := numbers[column]) is not None:
            code += [_op(_EQUAL, number, 0, 1), _op(_RETURN, answer)]
    refuse, allow = _op(_RETURN, ERRNO | _EPERM), _op(_RETURN, ALLOW)
    zero = [_op(_EQUAL, 0, 1, 0), refuse]
    conditional = {
        _CLONE: [_argument(0), _op(_ANY_BIT, _CLONE_REFUSED, 0, 1), refuse],
        # A stream alone: a datagram socket of a pair could still send to any address.
        _SOCKETPAIR: [_argument(0), _op(_EQUAL, 1, 1, 0), refuse, _argument(1), _op(_AND, 0xF), _op(_EQUAL, 1, 1, 0), refuse],
        _PRLIMIT: [_argument(0), *zero],
        _AFFINITY: [_argument(0), *zero],
        _PRIORITY: [_argument(0), *zero, _argument(1), *zero],
        _IOCTL: [_argument(1), *(op for value in _IOCTL_REFUSED for op in (_op(_EQUAL, value, 0, 1), refuse))],
        _FCNTL: [_argument(1), *(op for value in _FCNTL_REFUSED for op in (_op(_EQUAL, value, 0, 1), refuse))],
        _PRCTL: [_argument(0), *(op for value in _PRCTL_REFUSED for op in (_op(_EQUAL, value, 0, 1), refuse))],
    }
    if signals_only_to is not None:
        conditional |= {call: [_argument(0), _op(_EQUAL, signals_only_to, 1, 0), refuse] for call in _SIGNALS}
        conditional[_PIDFD_SIGNAL] = [refuse]
    for numbers, block in conditional.items():
        number = numbers[column]
        assert number is not None
        code += [_op(_EQUAL, number, 0, len(block) + 1), *block, allow]  # the block has loaded an argument over the number
    return b"".join([*code, allow])


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _argument(index: int) -> bytes:
    """Loads the low half of an argument (little-endian machines)."""
    return _op(_LOAD, _ARGUMENTS + 8 * index)
