use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::environment::{
    AssignmentPlace, Context, EnvironmentError, Given, Origin, check_name, compose,
    parse_assignment, parse_file,
};
use super::*;
use crate::config::HostConfig;
use crate::model::id::RequestId;
use crate::model::moment::Span;
use crate::model::name::{Channel, VariableName};
use crate::model::run::Counters;
use crate::model::run::{Run, RunState};
use crate::model::verdict::{Denial, DenyReason};
use crate::profile::{Profile, load_builtin, resolve};

const PROFILE: &str = r#"
[filesystem]
home = "~"
[environment]
set = { LANG = "C.UTF-8", LD_LIBRARY_PATH = "/opt/lib" }
pass = ["TERM"]
path = ["~/bin", "/usr/bin"]

[[capability]]
name = "repo.push"
permission = "repo:write"
channels = ["git", "env"]
ttl = "10m"
uses = 5
command = [["git", "push", "**"], ["/usr/bin/gh", "*"]]
[[capability.audience]]
protocol = "https"
host = "github.com"
secret = "github-bot"
variable = "GITHUB_TOKEN"
[[capability.audience]]
protocol = "https"
host = "gitlab.com"
secret = "gitlab-bot"
variable = "GITLAB_TOKEN"

[[capability]]
name = "db.read"
channels = ["file", "memfd", "token"]
command = [["**"]]
on_revoke = "wipe"
redact = false
[[capability.audience]]
host = "db.internal:5432"
secret = "db"

[[capability]]
name = "db.write"
channels = ["file"]
command = [["**"]]
[[capability.audience]]
host = "db.internal:5432"
secret = "db"
"#;

const CONFIG: &str = r#"
[ceilings]
requests_per_minute = 3
requests_per_run = 7
[leases]
default_ttl = "5m"
max_ttl = "30m"
[principals.alice]
permissions = ["repo:write"]
[secrets.github-bot]
source = "vault"
allow = ["repo.push@github.com"]
[secrets.db]
source = "vault"
allow = ["db.*@db.internal:*"]
[secrets.gitlab-bot]
source = "vault"
allow = ["repo.pull@gitlab.com"]
"#;

struct Scene {
    profile: Profile,
    config: HostConfig,
    run: Run,
    counters: Counters,
    argv: Vec<OsString>,
    program: PathBuf,
    found_on_path: bool,
    writable: bool,
}

fn scene() -> Scene {
    let config = HostConfig::parse(CONFIG, "sublet.toml").unwrap_or_else(|e| panic!("{e}"));
    Scene {
        profile: resolve("team", PROFILE, &mut load_builtin).unwrap_or_else(|e| panic!("{e}")),
        run: Run {
            run_id: "ci-1".parse().unwrap(),
            agent: "bot".parse().unwrap(),
            principal: "alice".parse().unwrap(),
            permissions: config.permissions_of(&"alice".parse().unwrap()).to_vec(),
            profile: "team".into(),
            workspace: "/w".into(),
            state: RunState::Active,
            started_at: jiff::Timestamp::UNIX_EPOCH,
        },
        config,
        counters: Counters::default(),
        argv: ["git", "push", "origin"].map(OsString::from).into(),
        program: "/usr/bin/git".into(),
        found_on_path: true,
        writable: false,
    }
}

fn request(flag: &str) -> Request {
    let flag: LeaseFlag = flag.parse().unwrap_or_else(|e| panic!("{flag}: {e}"));
    flag.into_request(RequestId::fresh(), "ci-1".parse().unwrap(), None)
}

impl Scene {
    fn policy(&self) -> Policy<'_> {
        Policy { profile: &self.profile, config: &self.config, has_issuer: false }
    }

    fn command(&self) -> ResolvedCommand<'_> {
        ResolvedCommand {
            argv: &self.argv,
            program: &self.program,
            found_on_path: self.found_on_path,
            writable_by_exec: self.writable,
        }
    }

    fn ask(&self, flag: &str) -> Result<Grant, Denial> {
        let command = self.command();
        decide(self.policy(), &request(flag), &self.run, self.counters, Some(&command))
            .into_result()
    }

    #[track_caller]
    fn granted(&self, flag: &str) -> Grant {
        self.ask(flag).unwrap_or_else(|d| panic!("{d}\n{}", d.hint))
    }

    /// Denied for `reason`; message and hint together hold every part of `said`.
    #[track_caller]
    fn denied(&self, flag: &str, reason: DenyReason, said: &[&str]) {
        let denial = self.ask(flag).expect_err("granted");
        assert_eq!(denial.reason, reason, "{denial}");
        assert_eq!(denial.asked, flag.split(',').next().unwrap());
        let text = format!("{}\n{}", denial.message, denial.hint);
        for part in said {
            assert!(text.contains(part), "no {part:?} in:\n{text}");
        }
    }
}

#[test]
fn what_is_permitted_is_granted_with_the_lesser_of_all_limits() {
    let s = scene();
    let grant = s.granted("repo.push@github.com");
    assert_eq!(grant.channel(), Channel::Git);
    assert_eq!((grant.ttl(), grant.uses().get()), (Span::seconds(300), 1));
    assert_eq!(grant.secret().as_str(), "github-bot");
    assert!(grant.redact() && grant.is_pinned());

    let grant = s.granted("repo.push@github.com,channel=env,ttl=10m,uses=5");
    assert_eq!(
        (grant.channel(), grant.ttl(), grant.uses().get()),
        (Channel::Env, Span::seconds(600), 5)
    );

    let grant = s.granted("db.read@db.internal:5432,ttl=30m");
    assert_eq!((grant.channel(), grant.ttl()), (Channel::File, Span::seconds(1800)));
    assert!(!grant.redact() && !grant.is_pinned());
    assert_eq!(grant.on_revoke(), crate::profile::OnRevoke::Wipe);
}

#[test]
fn capability_audience_and_channel_are_the_declared_ones() {
    let s = scene();
    s.denied(
        "repo.pull@github.com",
        DenyReason::CapabilityNotDeclared,
        &["team", "repo.pull", "`repo.push`", "`db.read`"],
    );
    s.denied(
        "repo.push@evil.org",
        DenyReason::AudienceNotPermitted,
        &["team", "`github.com`, `gitlab.com`"],
    );
    s.denied("repo.push@github.com:443", DenyReason::AudienceNotPermitted, &["github.com:443"]);
    s.denied(
        "repo.push@github.com,channel=file",
        DenyReason::ChannelMismatch,
        &["`git`, `env`", "team"],
    );
    s.granted("db.read@db.internal:5432,channel=memfd");
    s.denied(
        "db.read@db.internal:5432,channel=token",
        DenyReason::IdentityNotConfigured,
        &["`file`, `memfd`"],
    );

    let bare = Scene { profile: resolve("bare", "", &mut load_builtin).unwrap(), ..scene() };
    bare.denied(
        "repo.push@github.com",
        DenyReason::CapabilityNotDeclared,
        &["declares no capability;", "[[capability]]"],
    );
}

#[test]
fn a_missing_permission_says_what_to_add() {
    let mut s = scene();
    s.granted("repo.push@github.com");
    s.run.permissions = vec!["repo:read".parse().unwrap()];
    s.denied(
        "repo.push@github.com",
        DenyReason::PermissionMissing,
        &[
            "`alice`",
            "sublet.toml",
            "[principals.alice]\npermissions = [\"repo:read\", \"repo:write\"]",
        ],
    );
    s.granted("db.read@db.internal:5432");

    // The hint's own text must make the difference, for awkward names too.
    s.run.principal = "al\"ice@x.org".parse().unwrap();
    s.run.permissions.clear();
    let hint = s.ask("repo.push@github.com").unwrap_err().hint;
    let (_, toml) = hint.split_once('\n').unwrap();
    let config = HostConfig::parse(toml, "hint").unwrap_or_else(|e| panic!("{e}"));
    s.run.permissions = config.permissions_of(&s.run.principal).to_vec();
    s.granted("repo.push@github.com");
}

#[test]
fn ttl_and_uses_have_a_most() {
    let mut s = scene();
    s.denied(
        "repo.push@github.com,ttl=601s",
        DenyReason::TtlExceedsPolicy,
        &["601s", "ttl=10m", "`ttl` of capability `repo.push`", "team"],
    );
    s.denied(
        "db.read@db.internal:5432,ttl=31m",
        DenyReason::TtlExceedsPolicy,
        &["ttl=30m", "leases.max_ttl"],
    );
    s.denied(
        "repo.push@github.com,uses=6",
        DenyReason::UsesExceedChannel,
        &["6 uses", "5", "uses=5"],
    );
    s.denied("db.read@db.internal:5432,uses=2", DenyReason::UsesExceedChannel, &["uses=1"]);
    s.config.leases.max_ttl = Span::seconds(60);
    s.config.leases.default_ttl = Span::seconds(60);
    assert_eq!(s.granted("repo.push@github.com").ttl(), Span::seconds(60));
}

#[test]
fn ceilings_count_what_came_before() {
    let mut s = scene();
    s.counters = Counters { minute: 2, run: 6 };
    s.granted("repo.push@github.com");
    s.counters = Counters { minute: 3, run: 6 };
    s.denied(
        "repo.push@github.com",
        DenyReason::RateExceededMinute,
        &["requests_per_minute = 3", "ci-1", "sublet.toml"],
    );
    s.counters = Counters { minute: 0, run: 7 };
    s.denied("repo.push@github.com", DenyReason::RateExceededRun, &["requests_per_run = 7"]);
    s.counters = Counters { minute: u32::MAX, run: u32::MAX };
    s.denied("nonsense@x", DenyReason::RateExceededRun, &[]);
}

#[test]
fn only_the_callers_own_active_run_is_served() {
    let mut s = scene();
    s.run.state = RunState::Ended;
    s.denied("repo.push@github.com", DenyReason::RunNotActive, &["ci-1", "ended"]);
    s.run.state = RunState::Active;
    s.granted("repo.push@github.com");
    s.run.run_id = "ci-2".parse().unwrap();
    s.denied("repo.push@github.com", DenyReason::RunNotActive, &["`ci-1`", "`ci-2`"]);
}

#[test]
fn the_host_says_which_secret_serves_what() {
    let mut s = scene();
    s.denied(
        "repo.push@gitlab.com",
        DenyReason::SecretNotAllowed,
        &[
            "`gitlab-bot`",
            "`repo.pull@gitlab.com`",
            "allow = [\"repo.pull@gitlab.com\", \"repo.push@gitlab.com\"]",
        ],
    );
    s.config.secrets.clear();
    let denial = s.ask("repo.push@github.com").unwrap_err();
    assert_eq!(denial.reason, DenyReason::SecretNotAllowed);
    let (_, toml) = denial.hint.split_once('\n').unwrap();
    s.config.secrets = HostConfig::parse(toml, "hint").unwrap_or_else(|e| panic!("{e}")).secrets;
    s.granted("repo.push@github.com");
}

#[test]
fn a_pinned_capability_goes_with_its_commands_alone() {
    #[track_caller]
    fn check(argv: &[&str], program: &str, found_on_path: bool, permitted: bool) {
        let mut s = scene();
        s.argv = argv.iter().map(OsString::from).collect();
        s.program = program.into();
        s.found_on_path = found_on_path;
        if permitted {
            s.granted("repo.push@github.com");
            s.writable = true;
        }
        s.denied(
            "repo.push@github.com",
            DenyReason::CommandNotPermitted,
            &["team", "repo.push", program],
        );
        // The capability that says "any" goes with all of them.
        s.granted("db.read@db.internal:5432");
    }
    check(&["git", "push"], "/usr/bin/git", true, true);
    check(&["git", "push", "-f", "origin"], "/usr/bin/git", true, true);
    check(&["/usr/bin/git", "push"], "/usr/bin/git", true, true);
    check(&["git", "pull"], "/usr/bin/git", true, false);
    check(&["git"], "/usr/bin/git", true, false);
    check(&["git", "-c", "core.pager=x", "push"], "/usr/bin/git", true, false);
    check(&["sh", "push"], "/usr/bin/sh", true, false);
    // The name alone proves nothing: another file of that name, or another file under that name.
    check(&["/w/git", "push"], "/w/git", false, false);
    check(&["./git", "push"], "/w/git", false, false);
    check(&["git", "push"], "/w/git", false, false);
    check(&["git", "push"], "/usr/bin/sh", true, false);
    check(&["/usr/bin/git", "push"], "/w/evil", true, false);
    check(&["/usr/bin/../bin/git", "push"], "/usr/bin/git", true, false);
    // A pattern with an absolute path.
    check(&["/usr/bin/gh", "x"], "/usr/bin/gh", true, true);
    check(&["gh", "x"], "/usr/bin/gh", true, true);
    check(&["gh", "x"], "/usr/bin/gh", false, false);
    check(&["gh", "x"], "/opt/gh", true, false);
    check(&["gh"], "/usr/bin/gh", true, false);
    check(&["gh", "x", "y"], "/usr/bin/gh", true, false);

    let s = Scene { argv: vec![], ..scene() };
    s.denied("repo.push@github.com", DenyReason::CommandNotPermitted, &["git push **"]);
    // Without a command at hand the decision leaves it to the exec's own check.
    let verdict = decide(s.policy(), &request("repo.push@github.com"), &s.run, s.counters, None);
    let grant = verdict.into_result().unwrap();
    assert!(check_command(grant.capability(), "x", "team", &scene().command()).is_ok());
}

#[test]
fn hostile_words_of_a_command_do_not_reach_the_terminal() {
    let s = Scene { argv: vec!["git\x1b[2J".into(), "x".repeat(9999).into()], ..scene() };
    let message = s.ask("repo.push@github.com").unwrap_err().message;
    assert!(!message.contains('\x1b') && message.len() < 500, "{message}");
}

#[test]
fn the_leases_of_one_exec_are_granted_together() {
    let s = scene();
    let command = s.command();
    let all = |flags: &[&str], counters| {
        let requests: Vec<_> = flags.iter().map(|f| request(f)).collect();
        decide_all(s.policy(), &requests, &s.run, counters, Some(&command))
    };
    let none = Counters::default();
    let grants = all(&["repo.push@github.com", "db.read@db.internal:5432"], none).unwrap();
    assert_eq!(grants.len(), 2);
    let denial = all(&["db.read@db.internal:5432", "repo.push@evil.org"], none).unwrap_err();
    assert_eq!(denial.reason, DenyReason::AudienceNotPermitted);
    // Each counts: the second is the fourth of this minute.
    let denial =
        all(&["repo.push@github.com", "db.read@db.internal:5432"], Counters { minute: 2, run: 2 });
    assert_eq!(denial.unwrap_err().reason, DenyReason::RateExceededMinute);
    // One variable cannot carry two values, one host's git not two answers.
    let denial = all(&["db.read@db.internal:5432", "db.write@db.internal:5432"], none).unwrap_err();
    assert_eq!(denial.reason, DenyReason::DeliveryUnavailable);
    assert!(
        denial.message.contains("`DB_FILE`") && denial.message.contains("db.read@"),
        "{denial}"
    );
    assert!(all(&["repo.push@github.com", "repo.push@github.com"], none).is_err());
    assert!(
        all(&["db.read@db.internal:5432,channel=memfd", "db.write@db.internal:5432"], none).is_ok()
    );
    assert!(all(&["repo.push@github.com", "repo.push@github.com,channel=env"], none).is_ok());
}

#[track_caller]
fn name(text: &str) -> VariableName {
    text.parse().unwrap()
}

#[test]
fn who_may_set_which_variable() {
    let s = scene();
    let bare = Context::new(&s.profile, []);
    let git = [s.granted("repo.push@github.com")];
    let git = Context::for_grants(&s.profile, &git);
    let any = [s.granted("db.read@db.internal:5432")];
    let any = Context::for_grants(&s.profile, &any);

    #[track_caller]
    fn check(context: &Context<'_>, origin: Origin, text: &str, permitted: bool) {
        let found = check_name(&name(text), origin, context);
        assert_eq!(found.is_ok(), permitted, "{origin:?} {text} {found:?}");
    }
    let outside = [Origin::Flag, Origin::File, Origin::Passed];
    for origin in outside {
        check(&bare, origin, "MY_VAR", true);
        check(&any, origin, "MY_VAR", true);
        check(&git, origin, "MY_VAR", false);
        check(&bare, origin, "LD_PRELOAD", false);
    }
    check(&git, Origin::Profile, "MY_VAR", true);
    check(&git, Origin::ProfilePass, "TERM", true);
    check(&bare, Origin::Profile, "LD_PRELOAD", true);
    check(&bare, Origin::ProfilePass, "LD_PRELOAD", false);
    for origin in [Origin::Profile, Origin::ProfilePass].into_iter().chain(outside) {
        for text in ["GIT_AUTHOR_NAME", "https_proxy", "SSL_CERT_FILE"] {
            check(&git, origin, text, false);
            check(&any, origin, text, true);
            check(&bare, origin, text, true);
        }
        for text in [
            "SUBLET_SOCKET",
            "AWS_SECRET_ACCESS_KEY",
            "AZURE_CLIENT_SECRET",
            "PATH",
            "HOME",
            "GITHUB_TOKEN",
            "DB_FILE",
            "DB_FD",
        ] {
            check(&bare, origin, text, false);
            check(&any, origin, text, false);
        }
        // Declared for file and memfd alone, so the plain name is no one's.
        check(&bare, origin, "DB", true);
    }
    let e = check_name(&name("GITHUB_TOKEN"), Origin::Flag, &bare).unwrap_err().to_string();
    assert!(e.contains("--env cannot set") && e.contains("repo.push") && e.contains("team"), "{e}");
    let e = check_name(&name("X"), Origin::File, &git).unwrap_err().to_string();
    assert!(
        e.contains("--env-file") && e.contains("repo.push") && e.contains("[environment]"),
        "{e}"
    );
}

#[test]
fn the_environment_is_composed_in_order() {
    let s = scene();
    let context = Context::new(&s.profile, []);
    let given = |list: &[(&str, &str)]| -> Vec<Given> {
        let one =
            |(n, v): &(&str, &str)| Given { name: name(n), value: v.into(), origin: Origin::Flag };
        list.iter().map(one).collect()
    };
    let invoker = |n: &VariableName| (n.as_str() == "TERM").then(|| OsString::from("xterm"));
    let home = Path::new("/home/a");
    let list = given(&[("A", "1"), ("LANG", "C"), ("A", "2")]);
    let composed = compose(&context, list, invoker, home).unwrap();
    let lines: Vec<_> =
        composed.iter().map(|(n, v)| format!("{}={}", n.display(), v.display())).collect();
    assert_eq!(
        lines,
        [
            "A=2",
            "HOME=/home/a",
            "LANG=C",
            "LD_LIBRARY_PATH=/opt/lib",
            "PATH=/home/a/bin:/usr/bin",
            "TERM=xterm"
        ]
    );
    let refused = compose(&context, given(&[("A", "1"), ("SUBLET_X", "2")]), invoker, home);
    assert!(matches!(refused, Err(EnvironmentError::Class { .. })));
}

#[test]
fn env_files_are_read_as_docker_does() {
    let text = "\u{FEFF}# comment\n\n  A=1\r\nB=\"x y\"\n C = 2\n";
    let e = parse_file("f.env", text).unwrap_err();
    assert_eq!(e, EnvironmentError::Assignment { place: AssignmentPlace::Line("f.env".into(), 5) });

    let pairs = parse_file("f.env", &text.replace(" C = 2", "C==2 # x\nD=")).unwrap();
    let pairs: Vec<_> = pairs.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    assert_eq!(pairs, [("A", "1"), ("B", "\"x y\""), ("C", "=2 # x"), ("D", "")]);

    for (bad, line) in
        [("A=1\nhunter2", 2), ("export A=hunter2", 1), ("=hunter2", 1), ("A=hunter2\0", 1)]
    {
        let e = parse_file("f.env", bad).unwrap_err().to_string();
        assert!(e.starts_with(&format!("f.env:{line}:")) && !e.contains("hunter2"), "{e}");
    }
    assert!(parse_assignment("A=b=c", || AssignmentPlace::Flag(1)).is_ok());
    let e = parse_assignment("hunter2", || AssignmentPlace::Flag(3)).unwrap_err().to_string();
    assert!(e.contains("--env number 3") && !e.contains("hunter2"), "{e}");
}

/// Prints what a decision costs: `cargo test --release --lib deciding_costs -- --nocapture`.
#[test]
fn deciding_costs() {
    let s = scene();
    let (ask, command) = (request("repo.push@github.com,channel=env"), s.command());
    let rounds = 2000;
    let begin = Instant::now();
    for _ in 0..rounds {
        let verdict =
            decide(s.policy(), std::hint::black_box(&ask), &s.run, s.counters, Some(&command));
        std::hint::black_box(verdict.into_result().unwrap());
    }
    eprintln!("decide: {} ns", begin.elapsed().as_nanos() / rounds);
}
