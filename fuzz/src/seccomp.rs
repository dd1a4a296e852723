//! Filters of the user's: the text of a file like `seccomp/default.json`.
//!
//! What compiles is a program that the kernel would load, and answers every call as the lists of the file
//! do, which are read a second time here. Only names in [`CALLS`] are judged so.
#![forbid(unsafe_code)]

use serde_json::Value;
use sublet::sandbox::seccomp::{self, Filter};

/// `BPF_MAXINSNS`, linux/bpf_common.h.
const MAX_INSTRUCTIONS: usize = 4096;
const ARCH_X86_64: u32 = 0xc000_003e;
const ARCH_I386: u32 = 0x4000_0003;
const ALLOW: u32 = 0x7fff_0000;
const KILL_PROCESS: u32 = 0x8000_0000;

/// asm/unistd_64.h.
const CALLS: &[(&str, u32)] = &[
    ("read", 0),
    ("write", 1),
    ("open", 2),
    ("close", 3),
    ("mmap", 9),
    ("ioctl", 16),
    ("socket", 41),
    ("clone", 56),
    ("kill", 62),
    ("prctl", 157),
    ("openat", 257),
    ("unshare", 272),
    ("clone3", 435),
];

pub fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let described = seccomp::describe("fuzz", text);
    let filter = match seccomp::compile(text) {
        Ok(filter) => filter,
        Err(e) => {
            assert!(!e.to_string().is_empty());
            assert!(described.is_err(), "it is described but does not compile");
            return;
        }
    };
    let described = described.expect("what compiles can be described");
    assert_eq!(described.instructions, filter.len());
    loads(&filter);
    let gaps = filter.gaps();
    assert!(gaps.len() <= 64);
    // Another entry of the kernel numbers its calls differently.
    for nr in [0, 1, 11, 56, 511] {
        assert_eq!(answer(&filter, ARCH_I386, nr, &[0; 6]), KILL_PROCESS);
        assert_ne!(answer(&filter, ARCH_X86_64, nr | 0x4000_0000, &[0; 6]), ALLOW);
    }
    if let Some(lists) = Lists::read(text) {
        agrees(&filter, &lists);
    }
}

/// As `bpf_check_classic` and `seccomp_check_filter` of the kernel judge it (net/core/filter.c,
/// kernel/seccomp.c).
fn loads(filter: &Filter) {
    let program = filter.as_slice();
    assert!((1..=MAX_INSTRUCTIONS).contains(&program.len()));
    for (pc, insn) in program.iter().enumerate() {
        let left = program.len() - pc - 1;
        match insn.code {
            0x20 => assert!(insn.k.is_multiple_of(4) && insn.k < 64, "{pc}: load of {}", insn.k),
            0x05 => assert!((insn.k as usize) < left, "{pc}: jump over {}", insn.k),
            0x15 | 0x25 | 0x35 => {
                assert!(usize::from(insn.jt.max(insn.jf)) < left, "{pc}: a jump leaves it");
            }
            0x06 | 0x54 => {}
            code => panic!("{pc}: instruction {code:#x}"),
        }
    }
    assert_eq!(program[program.len() - 1].code, 0x06, "the end is no return");
}

/// Runs the program.
fn answer(filter: &Filter, arch: u32, nr: u32, args: &[u64; 6]) -> u32 {
    let data = |offset: u32| match offset {
        0 => nr,
        4 => arch,
        8 | 12 => 0,
        _ => {
            let arg = args[(offset as usize - 16) / 8];
            if offset.is_multiple_of(8) { arg as u32 } else { (arg >> 32) as u32 }
        }
    };
    let program = filter.as_slice();
    let (mut a, mut pc) = (0, 0);
    loop {
        let insn = &program[pc];
        pc += 1;
        pc += match insn.code {
            0x06 => return insn.k,
            0x20 => {
                a = data(insn.k);
                0
            }
            0x54 => {
                a &= insn.k;
                0
            }
            0x05 => insn.k as usize,
            code => {
                let yes = match code {
                    0x15 => a == insn.k,
                    0x25 => a > insn.k,
                    _ => a >= insn.k,
                };
                usize::from(if yes { insn.jt } else { insn.jf })
            }
        };
    }
}

struct Lists {
    refusing: Vec<(u32, Vec<Rule>)>,
    allowing: Vec<Rule>,
    default: u32,
}

struct Rule {
    nr: u32,
    conditions: Vec<Condition>,
}

struct Condition {
    index: usize,
    dword: bool,
    op: String,
    mask: u64,
    value: u64,
}

impl Lists {
    /// Nothing, if some name is not in the table.
    fn read(text: &str) -> Option<Self> {
        // Lists keep the order in which they are written: serde_json's map would sort them.
        let lists: Ordered = serde_json::from_str(text).ok()?;
        let mut read = Lists { refusing: Vec::new(), allowing: Vec::new(), default: 0 };
        for list in lists.0 {
            let action =
                |names: [&str; 2]| names.iter().find_map(|name| list.get(*name)).and_then(action);
            let matched = action(["match_action", "filter_action"])?;
            let otherwise = action(["mismatch_action", "default_action"])?;
            let rules: Option<Vec<Rule>> =
                list.get("filter")?.as_array()?.iter().map(Rule::read).collect();
            if matched == ALLOW {
                read.default = otherwise;
                read.allowing.extend(rules?);
            } else {
                read.refusing.push((matched, rules?));
            }
        }
        Some(read)
    }

    fn answer(&self, nr: u32, args: &[u64; 6]) -> u32 {
        let refused = self.refusing.iter().find(|(_, rules)| rules.iter().any(|r| r.is(nr, args)));
        match refused {
            Some((action, _)) => *action,
            None if self.allowing.iter().any(|r| r.is(nr, args)) => ALLOW,
            None => self.default,
        }
    }

    fn conditions(&self) -> impl Iterator<Item = &Condition> {
        let refusing = self.refusing.iter().flat_map(|(_, rules)| rules);
        refusing.chain(&self.allowing).flat_map(|rule| &rule.conditions)
    }
}

/// A JSON object's values, in their order.
struct Ordered(Vec<Value>);

impl<'de> serde::Deserialize<'de> for Ordered {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Values;
        impl<'de> serde::de::Visitor<'de> for Values {
            type Value = Ordered;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<M: serde::de::MapAccess<'de>>(
                self,
                mut map: M,
            ) -> Result<Ordered, M::Error> {
                let mut values = Vec::new();
                while let Some((_, value)) = map.next_entry::<serde::de::IgnoredAny, Value>()? {
                    values.push(value);
                }
                Ok(Ordered(values))
            }
        }
        d.deserialize_map(Values)
    }
}

fn action(value: &Value) -> Option<u32> {
    match (value.as_str(), value.get("errno").and_then(Value::as_u64)) {
        (Some("allow"), _) => Some(ALLOW),
        (Some("trap"), _) => Some(0x0003_0000),
        (Some("kill_thread"), _) => Some(0),
        (Some("kill_process"), _) => Some(KILL_PROCESS),
        (_, Some(number)) => Some(0x0005_0000 | number as u32),
        _ => None,
    }
}

impl Rule {
    fn read(value: &Value) -> Option<Self> {
        let name = value.get("syscall")?.as_str()?;
        let (_, nr) = *CALLS.iter().find(|(n, _)| *n == name)?;
        let conditions = match value.get("args") {
            None | Some(Value::Null) => Vec::new(),
            Some(list) => list.as_array()?.iter().map(Condition::read).collect::<Option<_>>()?,
        };
        Some(Self { nr, conditions })
    }

    fn is(&self, nr: u32, args: &[u64; 6]) -> bool {
        self.nr == nr && self.conditions.iter().all(|c| c.holds(args))
    }
}

impl Condition {
    fn read(value: &Value) -> Option<Self> {
        let op = value.get("op")?;
        let mask = op.get("masked_eq").and_then(Value::as_u64);
        Some(Self {
            index: value.get("index")?.as_u64()? as usize,
            dword: value.get("type")?.as_str()? == "dword",
            op: op.as_str().unwrap_or("masked_eq").to_owned(),
            mask: mask.unwrap_or(u64::MAX),
            value: value.get("val")?.as_u64()?,
        })
    }

    fn holds(&self, args: &[u64; 6]) -> bool {
        let cut = |number: u64| if self.dword { u64::from(number as u32) } else { number };
        let (given, value) = (cut(args[self.index]), cut(self.value));
        match self.op.as_str() {
            "eq" => given == value,
            "ne" => given != value,
            "ge" => given >= value,
            "gt" => given > value,
            "le" => given <= value,
            "lt" => given < value,
            _ => given & cut(self.mask) == value,
        }
    }
}

/// The program says what the lists say, to calls whose arguments lie around what the lists look at.
fn agrees(filter: &Filter, lists: &Lists) {
    let mut near: Vec<u64> = vec![0, 1, u64::MAX, 1 << 32];
    for condition in lists.conditions().take(24) {
        let v = condition.value;
        near.extend([v, v.wrapping_add(1), v.wrapping_sub(1), v | 1 << 32, v | !condition.mask]);
    }
    near.sort_unstable();
    near.dedup();
    for (name, nr) in CALLS.iter().copied().chain([("", 334), ("", 511), ("", 100_000)]) {
        for (nth, &value) in near.iter().enumerate() {
            for index in 0..6 {
                let mut args = [near[(nth * 7 + index) % near.len()]; 6];
                args[index] = value;
                let (said, meant) =
                    (answer(filter, ARCH_X86_64, nr, &args), lists.answer(nr, &args));
                assert_eq!(said, meant, "{name} {nr} {args:x?}: {said:#x} for {meant:#x}");
            }
        }
    }
}
