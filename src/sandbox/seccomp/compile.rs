//! From a filter file to one BPF program.
//!
//! Receives the text of a file of `seccomp/` (the JSON of the `seccompiler` crate, several named lists),
//! returns the instructions. Touches nothing; must never return a program that lets through what no
//! list allows. Both `build.rs` and the crate compile with this one file, so that a filter of the
//! user's is held to the same rules as those that are built in.
//!
//! `seccompiler` turns each list into a program of its own: a chain that compares the call's number
//! with every number of the list. Installed like that, one after the other, a call would pass through
//! a dozen chains of hundreds of comparisons, and the kernel walks them all once per call number at
//! installation to learn which calls are always allowed. So [`index`] asks each of those programs what
//! it says to each number, and puts a binary search over the answers in front of the parts that look
//! at arguments. Those parts are seccompiler's own instructions, moved as they are.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use seccompiler::{SeccompAction, SeccompCmpArgLen, SeccompCmpOp, TargetArch};
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};

use self::program::{
    Insn, Outcome, jump, jump_if_at_least, jump_if_equal, load_arch, load_number, ret, share,
    successors, walk,
};

#[path = "program.rs"]
pub mod program;

/// `AUDIT_ARCH_X86_64`, linux/audit.h: what `seccomp_data.arch` says for the 64-bit entry, x32 included.
pub const ARCH: u32 = 0xc000_003e;
/// `__X32_SYSCALL_BIT`, asm/unistd.h.
const X32_BIT: u32 = 0x4000_0000;
/// `BPF_MAXINSNS`, linux/bpf_common.h: a longer program is refused by the kernel.
pub const MAX_INSTRUCTIONS: usize = 4096;
/// Numbers from here on are in no table yet (Linux 6.12 ends at 462) and get the default answer, which
/// never allows.
const NUMBERS: u32 = 512;

const RET_ALLOW: u32 = 0x7fff_0000;
const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_ENOSYS: u32 = 0x0005_0000 | 38;
/// `MAX_ERRNO`: the kernel cuts larger values down to it.
const MAX_ERRNO: u32 = 4095;

#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    #[error("the filter is not valid JSON of the expected form: {0}")]
    Parse(#[source] serde_json::Error),
    #[error("the filter has no list whose match_action is \"allow\": it would refuse every call")]
    NothingAllowed,
    #[error("list {list:?} is empty: an empty list decides nothing and hides a mistake")]
    EmptyList { list: String },
    #[error(
        "list {list:?}: {what}. A list either allows (match_action \"allow\", any other call is refused) \
         or refuses (mismatch_action \"allow\": the call is then up to the other lists); refusing is \
         errno 1..4095, trap, kill_thread or kill_process"
    )]
    Action { list: String, what: &'static str },
    #[error(
        "lists {first:?} and {list:?} both allow, but answer differently what they do not name"
    )]
    TwoDefaults { first: String, list: String },
    #[error("list {list:?}, rule {rule} ({syscall}): {what}")]
    Rule { list: String, rule: usize, syscall: String, what: &'static str },
    #[error(
        "{syscall} is allowed by list {list:?} and refused whatever its arguments by {refused:?}"
    )]
    Contradiction { syscall: String, list: String, refused: String },
    #[error(
        "the filter does not compile: {0} (names of system calls are known up to Linux 6.12; newer ones \
         need no rule to be refused)"
    )]
    Seccompiler(#[source] seccompiler::Error),
    #[error("list {list:?}: its compiled form is not understood at instruction {at}")]
    Program { list: String, at: usize },
    #[error("the filter has {0} instructions, and the kernel takes at most {MAX_INSTRUCTIONS}")]
    TooLong(usize),
}

/// A filter file: its lists, in the order in which they are written.
#[derive(Debug)]
pub struct Document {
    pub lists: Vec<(String, List)>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct List {
    #[serde(alias = "default_action")]
    pub mismatch_action: SeccompAction,
    #[serde(alias = "filter_action")]
    pub match_action: SeccompAction,
    #[serde(rename = "filter")]
    pub rules: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    pub syscall: String,
    pub args: Option<Vec<Condition>>,
    pub comment: Option<String>,
}

/// Read here only to be judged; seccompiler reads and compiles it by itself.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    index: u8,
    #[serde(rename = "type")]
    width: SeccompCmpArgLen,
    op: SeccompCmpOp,
    val: u64,
    #[serde(rename = "comment")]
    _comment: Option<String>,
}

impl List {
    pub fn allows(&self) -> bool {
        self.match_action == SeccompAction::Allow
    }
}

impl Document {
    /// What becomes of a call that no list names.
    ///
    /// # Errors
    /// If no list allows anything, or those that do disagree.
    pub fn default_action(&self) -> Result<&SeccompAction, FilterError> {
        let mut allowing = self.lists.iter().filter(|(_, list)| list.allows());
        let (first, list) = allowing.next().ok_or(FilterError::NothingAllowed)?;
        let default = &list.mismatch_action;
        match allowing.find(|(_, other)| other.mismatch_action != *default) {
            Some((list, _)) => {
                Err(FilterError::TwoDefaults { first: first.clone(), list: list.clone() })
            }
            None => Ok(default),
        }
    }
}

/// Compiles the text of a filter file.
///
/// # Errors
/// If it is not of the form that `seccomp/default.json` shows, names an unknown call, or could let
/// through more than it says: an empty list, a default that allows, a rule that another one swallows.
pub fn compile(json: &str) -> Result<Vec<Insn>, FilterError> {
    let document = parse(json)?;
    let mut compiled = seccompiler::compile_from_json(json.as_bytes(), TargetArch::x86_64)
        .map_err(FilterError::Seccompiler)?;
    let mut refusing = Vec::new();
    let mut allowing = Vec::new();
    for (name, list) in &document.lists {
        let program = compiled.remove(name).unwrap_or_default();
        let side = if list.allows() { &mut allowing } else { &mut refusing };
        side.push((name.as_str(), program));
    }
    let default = u32::from(document.default_action()?.clone());
    let program = index(&refusing, &allowing, default)?;
    // Judged after `index`, which shortens: the kernel counts what it is given.
    if program.len() > MAX_INSTRUCTIONS {
        return Err(FilterError::TooLong(program.len()));
    }
    Ok(program)
}

/// Reads a filter file and refuses what would not do what it says.
///
/// # Errors
/// As [`compile`], but for names of calls, which only seccompiler knows.
pub fn parse(json: &str) -> Result<Document, FilterError> {
    let document: Document = serde_json::from_str(json).map_err(FilterError::Parse)?;
    for (name, list) in &document.lists {
        check_actions(name, list)?;
        check_rules(name, list)?;
    }
    document.default_action()?;
    check_across(&document)?;
    Ok(document)
}

fn check_actions(name: &str, list: &List) -> Result<(), FilterError> {
    let wrong = |what| FilterError::Action { list: name.to_owned(), what };
    if list.rules.is_empty() {
        return Err(FilterError::EmptyList { list: name.to_owned() });
    }
    let refusal = match (&list.match_action, &list.mismatch_action) {
        (SeccompAction::Allow, SeccompAction::Allow) => {
            return Err(wrong("it allows what matches and what does not"));
        }
        (SeccompAction::Allow, refusal) | (refusal, SeccompAction::Allow) => refusal,
        (_, _) => return Err(wrong("neither of its actions is \"allow\"")),
    };
    match refusal {
        SeccompAction::Errno(0) => {
            Err(wrong("errno 0 would tell the program that a refused call succeeded"))
        }
        SeccompAction::Errno(1..=MAX_ERRNO)
        | SeccompAction::Trap
        | SeccompAction::KillThread
        | SeccompAction::KillProcess => Ok(()),
        SeccompAction::Errno(_) => Err(wrong("its errno is above 4095")),
        SeccompAction::Log => Err(wrong("\"log\" lets the call through")),
        SeccompAction::Trace(_) => Err(wrong("\"trace\" leaves the decision to a tracer")),
        SeccompAction::Allow => Err(wrong("it allows what matches and what does not")),
    }
}

fn check_rules(name: &str, list: &List) -> Result<(), FilterError> {
    let mut unconditional: BTreeMap<&str, bool> = BTreeMap::new();
    for (i, rule) in list.rules.iter().enumerate() {
        let wrong = |what| FilterError::Rule {
            list: name.to_owned(),
            rule: i + 1,
            syscall: rule.syscall.clone(),
            what,
        };
        let always = rule.args.is_none();
        if let Some(before) = unconditional.insert(&rule.syscall, always)
            && (before || always)
        {
            // seccompiler keeps the conditions of the one and forgets the other.
            return Err(wrong("the same list names this call a second time without conditions"));
        }
        for condition in rule.args.iter().flatten() {
            let (mask, value) = match condition.op {
                SeccompCmpOp::MaskedEq(mask) => (mask, condition.val),
                _ => (u64::MAX, condition.val),
            };
            if condition.index > 5 {
                return Err(wrong("a call has arguments 0 to 5"));
            }
            if value & !mask != 0 {
                return Err(wrong(
                    "val has bits that masked_eq masks away, so it says something else",
                ));
            }
            // Only the low half is compared, so a value beyond it would be cut down silently.
            if condition.width == SeccompCmpArgLen::Dword && value > u64::from(u32::MAX) {
                return Err(wrong("val does not fit a dword"));
            }
        }
        if rule.args.as_ref().is_some_and(Vec::is_empty) {
            return Err(wrong(
                "args is empty; leave it out to name the call whatever its arguments",
            ));
        }
    }
    Ok(())
}

fn check_across(document: &Document) -> Result<(), FilterError> {
    let mut allowed: BTreeMap<&str, &str> = BTreeMap::new();
    for (name, list) in document.lists.iter().filter(|(_, list)| list.allows()) {
        for (i, rule) in list.rules.iter().enumerate() {
            let before = allowed.insert(&rule.syscall, name);
            if before.is_some_and(|other| other != name) {
                return Err(FilterError::Rule {
                    list: name.clone(),
                    rule: i + 1,
                    syscall: rule.syscall.clone(),
                    what: "another list allows this call already",
                });
            }
        }
    }
    for (name, list) in document.lists.iter().filter(|(_, list)| !list.allows()) {
        for rule in list.rules.iter().filter(|rule| rule.args.is_none()) {
            if let Some(allowing) = allowed.get(rule.syscall.as_str()) {
                return Err(FilterError::Contradiction {
                    syscall: rule.syscall.clone(),
                    list: (*allowing).to_owned(),
                    refused: name.clone(),
                });
            }
        }
    }
    Ok(())
}

/// What the whole filter says to one call number.
#[derive(PartialEq)]
enum Verdict {
    Always(u32),
    /// Instructions that look at the arguments; they end by returning, on every path.
    Depends(Vec<Insn>),
}

type Named<'a> = (&'a str, Vec<Insn>);

/// One program that answers as all lists together: the first refusing list that matches, else an
/// allowing one, else `default`.
fn index(refusing: &[Named], allowing: &[Named], default: u32) -> Result<Vec<Insn>, FilterError> {
    let mut runs: Vec<(u32, Verdict)> = Vec::new();
    for nr in 0..=NUMBERS {
        let verdict = verdict(nr, refusing, allowing, default)?;
        if runs.last().is_none_or(|(_, before)| *before != verdict) {
            runs.push((nr, verdict));
        }
    }
    let mut program = vec![
        load_arch(),
        jump_if_equal(ARCH, 1, 0),
        // A 32-bit entry numbers its calls differently. No errno: a 32-bit program cannot run here, and
        // a 64-bit one that enters through int 0x80 is looking for a way around. seccompiler does so too.
        ret(RET_KILL_PROCESS),
        load_number(),
        // The x32 ABI shares the arch value. ENOSYS is what a kernel without it says, as most are built.
        jump_if_at_least(X32_BIT, 0, 1),
        ret(RET_ENOSYS),
    ];
    program.extend(search(&runs));
    share(&program).map_err(|at| FilterError::Program { list: "(all)".to_owned(), at: at.0 })
}

/// Binary search for the run that holds the number; preorder, so that every jump goes forward.
fn search(runs: &[(u32, Verdict)]) -> Vec<Insn> {
    match runs {
        [] => vec![ret(RET_KILL_PROCESS)],
        [(_, Verdict::Always(action))] => vec![ret(*action)],
        [(_, Verdict::Depends(code))] => code.clone(),
        _ => {
            let (low, high) = runs.split_at(runs.len() / 2);
            let below = search(low);
            let mut code = match u8::try_from(below.len()) {
                Ok(distance) => vec![jump_if_at_least(high[0].0, distance, 0)],
                // A conditional jump reaches 255 instructions, an unconditional one reaches all.
                Err(_) => {
                    vec![jump_if_at_least(high[0].0, 0, 1), jump(below.len() as u32)]
                }
            };
            code.extend(below);
            code.extend(search(high));
            code
        }
    }
}

fn verdict(
    nr: u32,
    refusing: &[Named],
    allowing: &[Named],
    default: u32,
) -> Result<Verdict, FilterError> {
    let mut code = Vec::new();
    let mut last = None;
    for (name, program) in refusing {
        match ask(name, program, nr)? {
            Outcome::Return(RET_ALLOW) => {}
            Outcome::Return(action) => {
                last = Some(action);
                break;
            }
            Outcome::NeedsArgument(at) => code.extend(part(name, program, at, Falls::OnAllow)?),
        }
    }
    if last.is_none() {
        for (name, program) in allowing {
            match ask(name, program, nr)? {
                Outcome::Return(action) if action == default => {}
                Outcome::Return(action) => last = Some(action),
                Outcome::NeedsArgument(at) => {
                    code.extend(part(name, program, at, Falls::Never)?);
                    return Ok(Verdict::Depends(code));
                }
            }
        }
    }
    let last = last.unwrap_or(default);
    if code.is_empty() {
        return Ok(Verdict::Always(last));
    }
    code.push(ret(last));
    Ok(Verdict::Depends(code))
}

fn ask(name: &str, program: &[Insn], nr: u32) -> Result<Outcome, FilterError> {
    walk(program, nr, ARCH, None)
        .map_err(|at| FilterError::Program { list: name.to_owned(), at: at.0 })
}

#[derive(Clone, Copy, PartialEq)]
enum Falls {
    /// A refusing list that does not match leaves the call to what follows.
    OnAllow,
    Never,
}

/// The instructions of `program` that can run from `at` on, as a piece that can stand anywhere.
fn part(name: &str, program: &[Insn], at: usize, falls: Falls) -> Result<Vec<Insn>, FilterError> {
    let broken = |at| FilterError::Program { list: name.to_owned(), at };
    let mut reached = BTreeSet::new();
    let mut open = vec![at];
    while let Some(pc) = open.pop() {
        if reached.insert(pc) {
            let insn = program.get(pc).ok_or_else(|| broken(pc))?;
            open.extend(successors(insn, pc).ok_or_else(|| broken(pc))?);
        }
    }
    let end = reached.last().map_or(at, |last| last + 1);
    let piece = (at..end).map(|pc| match &program[pc] {
        // The kernel checks the jumps of dead instructions as well.
        _ if !reached.contains(&pc) => ret(RET_KILL_PROCESS),
        insn if falls == Falls::OnAllow && *insn == ret(RET_ALLOW) => jump((end - pc - 1) as u32),
        insn => insn.clone(),
    });
    Ok(piece.collect())
}

impl<'de> Deserialize<'de> for Document {
    /// As a map that keeps its order, which decides between two refusals, and refuses a repeated key.
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Lists;
        impl<'de> Visitor<'de> for Lists {
            type Value = Document;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of named lists")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Document, M::Error> {
                let mut lists: Vec<(String, List)> = Vec::new();
                while let Some((name, list)) = map.next_entry::<String, List>()? {
                    if lists.iter().any(|(other, _)| *other == name) {
                        return Err(serde::de::Error::custom(format!(
                            "there are two lists {name:?}"
                        )));
                    }
                    lists.push((name, list));
                }
                Ok(Document { lists })
            }
        }
        deserializer.deserialize_map(Lists)
    }
}
