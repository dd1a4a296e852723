//! What can be judged without installing anything; `tests/seccomp_filters.rs` makes the real calls.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::compile::program::{Insn, Outcome, walk};
use super::compile::{ARCH, parse};
use super::*;

const RET_ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0001;
const ENOSYS: u32 = 0x0005_0026;
const KILL_PROCESS: u32 = 0x8000_0000;

fn instructions(filter: &Filter) -> Vec<Insn> {
    filter.iter().map(|i| Insn { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect()
}

fn answer(filter: &Filter, arch: u32, nr: i64, args: [u64; 6]) -> u32 {
    match walk(&instructions(filter), nr as u32, arch, Some(&args)).unwrap() {
        Outcome::Return(action) => action,
        Outcome::NeedsArgument(at) => panic!("arguments were given, yet asked for at {at}"),
    }
}

/// A file with one allowing list, around `rules`.
fn allowing(rules: &str) -> String {
    format!(
        r#"{{"a": {{"mismatch_action": {{"errno": 38}}, "match_action": "allow", "filter": [{rules}]}}}}"#
    )
}

/// A file that allows read and ioctl, and refuses with `rules`.
fn refusing(rules: &str) -> String {
    format!(
        r#"{{"a": {{"mismatch_action": {{"errno": 38}}, "match_action": "allow",
                    "filter": [{{"syscall": "read"}}, {{"syscall": "ioctl"}}]}},
            "r": {{"mismatch_action": "allow", "match_action": {{"errno": 1}}, "filter": [{rules}]}}}}"#
    )
}

#[test]
fn files_that_could_fail_open_are_refused() {
    #[track_caller]
    fn check(json: &str, says: &str) {
        let error = compile(json).expect_err("compiled").to_string();
        assert!(error.contains(says), "{error:?} does not say {says:?}");
    }
    check("", "line 1 column 0");
    check("{}", "it would refuse every call");
    check("[]", "an object of named lists");
    check(&allowing(""), r#"list "a" is empty"#);
    check(r#"{"a": {"mismatch_action": {"errno": 1}, "match_action": "allow"}}"#, "missing field");
    check(&allowing(r#"{"syscall": "no_such_call"}"#), "no_such_call");
    check(&allowing(r#"{"syscall": "read", "arg": []}"#), "unknown field `arg`");
    check(&allowing(r#"{"syscall": "read", "args": []}"#), "args is empty");
    check(&allowing(r#"{"syscall": "read"}, {"syscall": "read"}"#), "rule 2 (read)");
    let one = r#""filter": [{"syscall": "read"}]"#;
    let list = |mismatch: &str, matched: &str| {
        format!(r#"{{"a": {{"mismatch_action": {mismatch}, "match_action": {matched}, {one}}}}}"#)
    };
    check(&list(r#""allow""#, r#""allow""#), "allows what matches and what does not");
    check(&list(r#""allow""#, r#"{"errno": 1}"#), "would refuse every call");
    check(&list(r#""log""#, r#""allow""#), "lets the call through");
    check(&list(r#"{"trace": 1}"#, r#""allow""#), "leaves the decision to a tracer");
    check(&list(r#"{"errno": 0}"#, r#""allow""#), "errno 0");
    check(&list(r#"{"errno": 5000}"#, r#""allow""#), "above 4095");
    check(&list(r#"{"errno": 1}"#, r#""trap""#), "neither of its actions");
    check(&list(r#""no_such_action""#, r#""allow""#), "no_such_action");
    check(
        &format!(
            r#"{{"a": {{"mismatch_action": {{"errno": 1}}, "match_action": "allow", {one}}},
                 "b": {{"mismatch_action": {{"errno": 38}}, "match_action": "allow",
                        "filter": [{{"syscall": "write"}}]}}}}"#
        ),
        "answer differently",
    );
    check(
        &format!(
            r#"{{"a": {{"mismatch_action": {{"errno": 1}}, "match_action": "allow", {one}}},
                 "a": {{"mismatch_action": {{"errno": 1}}, "match_action": "allow", {one}}}}}"#
        ),
        "two lists",
    );
    // seccompiler would forget the rule without conditions, and refuse less than is written.
    let narrow =
        r#"{"syscall": "ioctl", "args": [{"index": 1, "type": "dword", "op": "eq", "val": 1}]}"#;
    check(&refusing(&format!(r#"{narrow}, {{"syscall": "ioctl"}}"#)), "a second time");
    check(&refusing(&format!(r#"{{"syscall": "ioctl"}}, {narrow}"#)), "a second time");
    check(&refusing(r#"{"syscall": "read"}"#), "read is allowed by list");
    let condition = |c: &str| refusing(&format!(r#"{{"syscall": "ioctl", "args": [{c}]}}"#));
    check(&condition(r#"{"index": 6, "type": "dword", "op": "eq", "val": 1}"#), "arguments 0 to 5");
    check(
        &condition(r#"{"index": 1, "type": "dword", "op": "eq", "val": 4294967296}"#),
        "does not fit a dword",
    );
    check(
        &condition(r#"{"index": 1, "type": "dword", "op": {"masked_eq": 2}, "val": 3}"#),
        "masks away",
    );
    // Conditions of one rule can be too many for the kernel.
    let many = vec![r#"{"index": 1, "type": "qword", "op": {"masked_eq": 1}, "val": 1}"#; 700];
    check(&condition(&many.join(",")), "instructions");
}

#[test]
fn a_file_that_says_what_it_means_compiles() {
    let narrow = r#"{"syscall": "ioctl", "comment": "why",
        "args": [{"index": 1, "type": "dword", "op": "eq", "val": 21522, "comment": "TIOCSTI"}]}"#;
    let filter = compile(&refusing(narrow)).unwrap();
    assert_eq!(answer(&filter, ARCH, libc::SYS_read, [0; 6]), RET_ALLOW);
    assert_eq!(answer(&filter, ARCH, libc::SYS_write, [0; 6]), ENOSYS);
    assert_eq!(answer(&filter, ARCH, libc::SYS_ioctl, [0, 21523, 0, 0, 0, 0]), RET_ALLOW);
    assert_eq!(answer(&filter, ARCH, libc::SYS_ioctl, [0, 21522, 0, 0, 0, 0]), EPERM);
    let garbage = [u64::MAX, 0xffff_ffff_0000_5412, 0, 0, 0, 0];
    assert_eq!(answer(&filter, ARCH, libc::SYS_ioctl, garbage), EPERM);
}

#[test]
fn foreign_abis_are_refused_before_anything_is_looked_at() {
    const I386: u32 = 0x4000_0003;
    const AARCH64: u32 = 0xc000_00b7;
    for name in builtin_names() {
        let filter = builtin(name).unwrap();
        assert_eq!(answer(&filter, ARCH, libc::SYS_read, [0; 6]), RET_ALLOW);
        for nr in [0, libc::SYS_read, libc::SYS_close, -1] {
            assert_eq!(answer(&filter, I386, nr, [0; 6]), KILL_PROCESS, "{name}: {nr}");
            assert_eq!(answer(&filter, AARCH64, nr, [0; 6]), KILL_PROCESS, "{name}: {nr}");
        }
        for nr in [0, 59, 231, 520, 547] {
            assert_eq!(answer(&filter, ARCH, nr | 0x4000_0000, [0; 6]), ENOSYS, "{name}: {nr}");
        }
        // -1 is what a tracer sets to skip a call.
        assert_eq!(answer(&filter, ARCH, -1, [0; 6]), ENOSYS);
    }
}

#[test]
fn only_a_filter_of_the_users_can_have_gaps() {
    for name in ["default", "build", "strict", "init", "broker"] {
        assert_eq!(builtin(name).unwrap().gaps(), <[&str; 0]>::default(), "{name}");
    }
    let filter = compile(&refusing(r#"{"syscall": "ptrace"}"#)).unwrap();
    assert_eq!(filter.gaps(), ["no typing into the terminal"]);
    let filter = compile(&allowing(
        r#"{"syscall": "mount"}, {"syscall": "clone3"}, {"syscall": "umount2"},
           {"syscall": "chmod", "args": [{"index": 1, "type": "dword",
                                          "op": {"masked_eq": 2048}, "val": 0}]}"#,
    ));
    assert_eq!(
        filter.unwrap().gaps(),
        ["no new namespaces", "no set-uid or set-gid bits", "no mounts"]
    );
}

/// The lists of a file as seccompiler compiles them, each asked in turn: what [`compile`] must equal.
struct Reference {
    refusing: Vec<Vec<Insn>>,
    allowing: Vec<Vec<Insn>>,
    default: u32,
}

impl Reference {
    fn of(text: &str) -> Self {
        let document = parse(text).unwrap();
        let mut programs =
            seccompiler::compile_from_json(text.as_bytes(), seccompiler::TargetArch::x86_64)
                .unwrap();
        let default = u32::from(document.default_action().unwrap().clone());
        let mut side = |allows: bool| {
            let lists = document.lists.iter().filter(|(_, list)| list.allows() == allows);
            lists.map(|(name, _)| programs.remove(name).unwrap()).collect()
        };
        Self { refusing: side(false), allowing: side(true), default }
    }

    fn answer(&self, nr: u32, args: &[u64; 6]) -> u32 {
        if nr >= 0x4000_0000 {
            return ENOSYS;
        }
        let ask = |program: &Vec<Insn>| match walk(program, nr, ARCH, Some(args)).unwrap() {
            Outcome::Return(action) => action,
            Outcome::NeedsArgument(_) => unreachable!("arguments were given"),
        };
        let refused = self.refusing.iter().map(ask).find(|&action| action != RET_ALLOW);
        let allowed = || self.allowing.iter().map(ask).any(|action| action == RET_ALLOW);
        refused.unwrap_or_else(|| if allowed() { RET_ALLOW } else { self.default })
    }
}

/// Values that the rules compare with, with neighbours, and with garbage in the upper half.
fn argument() -> impl Strategy<Value = u64> {
    let bit = (0u32..64).prop_map(|shift| 1u64 << shift);
    let telling = prop::sample::select(vec![
        0u64,
        1,
        2,
        3,
        5,
        6,
        8,
        10,
        16,
        17,
        38,
        40,
        58,
        93,
        132,
        255,
        262,
        0x5412,
        0x541c,
        0x541d,
        0x5423,
        0o4755,
        0o2755,
        0o6755,
        0o1777,
        0o644,
        0o100,
        0o101,
        0o20200000,
        0o20200002,
        0o020666,
        0o060666,
        0o010666,
        0o140666,
        0x20000,
        0x20008,
        0x40000,
        0xffff_ffff,
        0x80803,
        0x7e02_0000,
        17,
    ]);
    (prop_oneof![telling, bit, any::<u64>()], any::<bool>())
        .prop_map(|(value, dirty)| if dirty { value | 0xabcd_ef01_0000_0000 } else { value })
}

/// What no built-in filter has: conditions on allowing, several on one call on both sides, other
/// actions, two refusals of which the first counts.
const ODD_FILE: &str = r#"{
  "second to none": {"mismatch_action": "allow", "match_action": "kill_process", "filter": [
    {"syscall": "socket", "args": [{"index": 0, "type": "qword", "op": "eq", "val": 16}]},
    {"syscall": "mount"}]},
  "allow": {"mismatch_action": "trap", "match_action": "allow", "filter": [
    {"syscall": "read"},
    {"syscall": "socket", "args": [{"index": 0, "type": "dword", "op": "le", "val": 16},
                                   {"index": 1, "type": "qword", "op": "ge", "val": 2}]},
    {"syscall": "socket", "args": [{"index": 2, "type": "qword", "op": {"masked_eq": 4294967299}, "val": 1}]},
    {"syscall": "chmod", "args": [{"index": 1, "type": "dword", "op": {"masked_eq": 3072}, "val": 0}]}]},
  "refuse": {"mismatch_action": "allow", "match_action": {"errno": 1}, "filter": [
    {"syscall": "socket", "args": [{"index": 0, "type": "qword", "op": "gt", "val": 15}]},
    {"syscall": "socket", "args": [{"index": 1, "type": "dword", "op": "lt", "val": 3}]},
    {"syscall": "mount"}, {"syscall": "ioctl"}]},
  "allow more": {"mismatch_action": "trap", "match_action": "allow", "filter": [
    {"syscall": "write", "args": [{"index": 0, "type": "dword", "op": "ne", "val": 2}]}]}
}"#;

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_index_answers_as_the_lists_do(
        args in prop::array::uniform6(argument()),
        odd in any::<u32>(),
    ) {
        let built_in = builtin_names().map(|name| builtin_text(name).unwrap());
        for text in built_in.chain([ODD_FILE]) {
            let reference = Reference::of(text);
            let program = instructions(&compile(text).unwrap());
            for nr in (0..600).chain([odd, (odd % 600) | 0x4000_0000]) {
                let got = walk(&program, nr, ARCH, Some(&args)).unwrap();
                let expected = Outcome::Return(reference.answer(nr, &args));
                prop_assert_eq!(got, expected, "call {} with {:x?} of {}", nr, args, text);
            }
        }
    }
}

/// The kernel keeps a bitmap of calls that a filter allows without a look at arguments; those cost
/// nothing. It finds them by following the program as `walk` does.
#[test]
fn the_common_calls_cost_no_look_at_arguments() {
    for name in ["default", "build", "strict", "broker"] {
        let program = instructions(&builtin(name).unwrap());
        // The broker's looks for code to execute.
        let mapping = (name != "broker").then_some(libc::SYS_mmap);
        for nr in mapping.into_iter().chain([
            libc::SYS_read,
            libc::SYS_write,
            libc::SYS_futex,
            libc::SYS_close,
            libc::SYS_newfstatat,
            libc::SYS_epoll_wait,
            libc::SYS_sendmsg,
        ]) {
            let got = walk(&program, nr as u32, ARCH, None).unwrap();
            assert_eq!(got, Outcome::Return(RET_ALLOW), "{name}: {nr}");
        }
        assert!(matches!(
            walk(&program, libc::SYS_ioctl as u32, ARCH, None),
            Ok(Outcome::NeedsArgument(_))
        ));
    }
}

#[test]
fn the_compiled_in_programs_are_what_their_text_compiles_to() {
    for name in builtin_names() {
        let again = compile(builtin_text(name).unwrap()).unwrap();
        assert!(instructions(&again) == instructions(&builtin(name).unwrap()), "{name}");
    }
    assert!(builtin("no-such-filter").is_none());
    assert!(builtin("../default").is_none());
}

#[test]
fn every_refusal_and_every_list_says_why() {
    for name in builtin_names() {
        for (list_name, list) in &parse(builtin_text(name).unwrap()).unwrap().lists {
            for (i, rule) in list.rules.iter().enumerate() {
                // The first rule of an allowing list speaks for the list.
                if i == 0 || !list.allows() || rule.args.is_some() {
                    let said = rule.comment.as_deref().unwrap_or_default();
                    assert!(!said.trim().is_empty(), "{name}: {list_name}: {}", rule.syscall);
                }
            }
        }
    }
}

/// (list, rule) of each call.
fn rules_of(name: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut rules: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (_, list) in parse(builtin_text(name).unwrap()).unwrap().lists {
        for rule in list.rules {
            let said =
                format!("{:?}/{:?} {:?}", list.mismatch_action, list.match_action, rule.args);
            rules.entry(rule.syscall).or_default().insert(said);
        }
    }
    rules
}

#[test]
fn default_decides_every_call_that_has_a_name() {
    let program = instructions(&builtin("default").unwrap());
    let names: BTreeSet<_> = rules_of("default").into_keys().collect();
    // Linux 6.12 has 0..=335 and 424..=462 on x86_64, each under one name.
    assert_eq!(names.len(), 336 + 39);
    for nr in (336..424).chain(463..1100) {
        assert_eq!(walk(&program, nr, ARCH, None).unwrap(), Outcome::Return(ENOSYS), "{nr}");
    }
}

#[test]
fn build_is_default_with_another_personality() {
    let (default, build) = (rules_of("default"), rules_of("build"));
    assert!(default.keys().eq(build.keys()));
    let differing: Vec<_> = default.iter().filter(|(name, said)| build[*name] != **said).collect();
    assert_eq!(differing.into_iter().map(|(name, _)| name).collect::<Vec<_>>(), ["personality"]);
    let call = |filter: &str, value| {
        answer(&builtin(filter).unwrap(), ARCH, libc::SYS_personality, [value, 0, 0, 0, 0, 0])
    };
    const ADDR_NO_RANDOMIZE: u64 = 0x40000;
    const READ_IMPLIES_EXEC: u64 = 0x400000;
    assert_eq!(call("default", ADDR_NO_RANDOMIZE), EPERM);
    assert_eq!(call("build", ADDR_NO_RANDOMIZE), RET_ALLOW);
    assert_eq!(call("build", READ_IMPLIES_EXEC), EPERM);
    assert_eq!(call("build", ADDR_NO_RANDOMIZE | READ_IMPLIES_EXEC), EPERM);
}

#[test]
fn strict_allows_no_call_that_default_does_not() {
    let default = instructions(&builtin("default").unwrap());
    let strict = instructions(&builtin("strict").unwrap());
    let allowed = |program: &[Insn], nr| {
        // Every call with conditions takes these: a plain file, an ordinary clone, a Unix socket.
        let args = [1u64, 0, 0, 0, 0, 0];
        walk(program, nr, ARCH, Some(&args)).unwrap() == Outcome::Return(RET_ALLOW)
    };
    let (mut in_strict, mut in_default) = (0, 0);
    for nr in 0..600 {
        in_strict += usize::from(allowed(&strict, nr));
        in_default += usize::from(allowed(&default, nr));
        assert!(!allowed(&strict, nr) || allowed(&default, nr), "{nr}");
    }
    assert!(in_strict * 3 < in_default * 2, "{in_strict} of {in_default}");
}

#[test]
fn a_description_counts_and_gives_reasons() {
    let said = describe("default", builtin_text("default").unwrap()).unwrap();
    assert_eq!((said.name.as_str(), said.default_action.as_str()), ("default", "ENOSYS"));
    assert!(said.allowed > 250 && said.conditional > 10 && said.conditional < 30, "{said:?}");
    assert!(said.instructions <= compile::MAX_INSTRUCTIONS);
    let group = said.refused.iter().find(|g| g.name == "set-uid and set-gid bits").unwrap();
    assert_eq!(group.action, "EPERM");
    assert!(group.calls.iter().any(|c| c.syscall == "fchmodat2" && c.conditional));
    let init = describe("init", builtin_text("init").unwrap()).unwrap();
    assert_eq!((init.default_action.as_str(), init.refused.len()), ("EPERM", 0));
}
