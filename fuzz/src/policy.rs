//! `--lease` flags and the decision. The parts of an input: a profile, a configuration, flags (one a
//! line), the principal's permissions, the command (its program, what is known of it, its arguments), the
//! run's counters. What of them is no profile or configuration is taken from a good one.
//!
//! The verdict must be the one that [`is_permitted`] finds, which is written down a second time here from
//! the documentation: above all, nothing is granted that profile and configuration do not declare.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::num::NonZeroU32;
use std::path::PathBuf;

use sublet::config::{AllowPattern, HostConfig, SecretSource};
use sublet::model::id::{RequestId, RunId};
use sublet::model::moment::Span;
use sublet::model::name::{Channel, Permission};
use sublet::model::run::{Counters, Run, RunState};
use sublet::model::verdict::Denial;
use sublet::policy::{
    Grant, LeaseFlag, Policy, Request, ResolvedCommand, Verdict, decide, decide_all,
};
use sublet::profile::{self, Capability, PatternElement, Place, Profile};

use super::feed::parts;

const PROFILE: &str = include_str!("good.profile.toml");
const CONFIG: &str = include_str!("good.sublet.toml");

pub fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let mut part = parts(text);
    let mut next = || part.next().unwrap_or_default();
    let (profile, config, flags) = (next(), next(), next());
    let (permissions, command, counters) = (next(), next(), next());
    let profile = profile::resolve("fuzz", profile, &mut profile::load_builtin)
        .or_else(|_| profile::resolve("fuzz", PROFILE, &mut profile::load_builtin))
        .expect("the profile at hand is good");
    let config = HostConfig::parse(config, "sublet.toml")
        .or_else(|_| HostConfig::parse(CONFIG, "sublet.toml"))
        .expect("the configuration at hand is good");
    let mut words = counters.split_whitespace();
    let mut number = || words.next().and_then(|n| n.parse().ok()).unwrap_or(0);
    let counters = Counters { minute: number(), run: number() };
    let run = asker(permissions, counters.run.is_multiple_of(7));
    let flags: Vec<LeaseFlag> = flags.lines().take(8).filter_map(flag).collect();
    let requests: Vec<Request> = flags
        .into_iter()
        .zip(0u32..)
        .map(|(flag, nth)| {
            let of: &str = if counters.minute == 1000 + nth { "other-run" } else { "this-run" };
            flag.into_request(RequestId::fresh(), of.parse().expect("a run id"), None)
        })
        .collect();
    let command = Given::parse(command);
    let case = Case { profile: &profile, config: &config, run: &run, command: command.as_ref() };
    for request in &requests {
        case.check_one(request, counters);
    }
    case.check_all(&requests, counters);
}

/// A flag that parses is what its own text says, whatever the order of its options.
fn flag(line: &str) -> Option<LeaseFlag> {
    let flag: LeaseFlag = match line.parse() {
        Ok(flag) => flag,
        Err(e) => {
            assert!(!format!("{e}").contains(char::is_control), "{e:?}");
            return None;
        }
    };
    let mut text = format!("{}@{}", flag.capability, flag.audience);
    if let Some(uses) = flag.uses {
        text += &format!(",uses={uses}");
    }
    if let Some(ttl) = flag.ttl {
        text += &format!(",ttl={ttl}");
    }
    if let Some(channel) = flag.channel {
        text += &format!(",channel={channel}");
    }
    assert_eq!(text.parse::<LeaseFlag>().as_ref(), Ok(&flag), "{line:?} {text:?}");
    Some(flag)
}

fn asker(permissions: &str, active: bool) -> Run {
    let run_id: RunId = "this-run".parse().expect("a run id");
    Run {
        run_id,
        agent: "agent".parse().expect("a name"),
        principal: "alice".parse().expect("a name"),
        permissions: permissions.split_whitespace().filter_map(|p| p.parse().ok()).collect(),
        profile: "fuzz".to_owned(),
        workspace: PathBuf::from("/work"),
        state: if active { RunState::Active } else { RunState::Ended },
        started_at: jiff::Timestamp::UNIX_EPOCH,
    }
}

/// The command of an input: the program, two words of what is known of it, then argv.
struct Given {
    program: PathBuf,
    found_on_path: bool,
    writable_by_exec: bool,
    argv: Vec<OsString>,
}

impl Given {
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let program = lines.next().filter(|line| !line.is_empty())?.into();
        let known = lines.next().unwrap_or_default();
        Some(Self {
            program,
            found_on_path: known.contains("path"),
            writable_by_exec: known.contains("writable"),
            argv: lines.map(OsString::from).collect(),
        })
    }

    fn resolved(&self) -> ResolvedCommand<'_> {
        ResolvedCommand {
            argv: &self.argv,
            program: &self.program,
            found_on_path: self.found_on_path,
            writable_by_exec: self.writable_by_exec,
        }
    }
}

struct Case<'a> {
    profile: &'a Profile,
    config: &'a HostConfig,
    run: &'a Run,
    command: Option<&'a Given>,
}

impl Case<'_> {
    fn policy(&self) -> Policy<'_> {
        Policy { profile: self.profile, config: self.config, has_issuer: true }
    }

    fn check_one(&self, request: &Request, counters: Counters) {
        let command = self.command.map(Given::resolved);
        let permitted = self.is_permitted(request, counters);
        match decide(self.policy(), request, self.run, counters, command.as_ref()) {
            Verdict::Granted(grant) => {
                assert!(permitted, "granted: {request:?}");
                self.check_grant(&grant, request);
            }
            Verdict::Denied(denial) => {
                assert!(!permitted, "denied: {denial}\n{request:?}");
                check_denial(&denial, request);
            }
        }
    }

    /// Several leases are granted together or not at all, each as it would be alone, none in the place of
    /// another.
    fn check_all(&self, requests: &[Request], counters: Counters) {
        let command = self.command.map(Given::resolved);
        let alone = requests.iter().zip(0u32..).all(|(request, before)| {
            let counters = Counters {
                minute: counters.minute.saturating_add(before),
                run: counters.run.saturating_add(before),
            };
            self.is_permitted(request, counters)
        });
        match decide_all(self.policy(), requests, self.run, counters, command.as_ref()) {
            Ok(grants) => {
                assert!(alone && grants.len() == requests.len());
                for (nth, grant) in grants.iter().enumerate() {
                    self.check_grant(grant, &requests[nth]);
                    for other in &grants[..nth] {
                        assert!(!share_a_place(grant, other), "{grant:?} {other:?}");
                    }
                }
            }
            Err(denial) => {
                let request = requests.iter().find(|r| r.asked() == denial.asked);
                check_denial(&denial, request.expect("a denial is of one of the requests"));
                let several = requests.len() > 1;
                assert!(!alone || several, "denied: {denial}");
            }
        }
    }

    fn is_permitted(&self, request: &Request, counters: Counters) -> bool {
        let ceilings = self.config.ceilings;
        let named = |c: &&std::sync::Arc<Capability>| c.name == request.capability;
        let Some(capability) = self.profile.capabilities.iter().find(named) else { return false };
        let Some(audience) = capability.audiences.iter().find(|a| a.host == request.audience)
        else {
            return false;
        };
        let channel = request.channel.unwrap_or(capability.channels[0]);
        let longest = capability.ttl.unwrap_or(Span::seconds(365 * 86_400));
        let secret = self.config.secrets.get(&audience.secret);
        request.run_id == self.run.run_id
            && self.run.state == RunState::Active
            && counters.run < ceilings.requests_per_run.get()
            && counters.minute < ceilings.requests_per_minute.get()
            && capability.channels.contains(&channel)
            && capability.permission.as_ref().is_none_or(|p: &Permission| {
                self.run.permissions.iter().any(|held| held.as_str() == p.as_str())
            })
            && request.ttl.is_none_or(|t| t <= longest && t <= self.config.leases.max_ttl)
            && request.uses.unwrap_or(NonZeroU32::MIN) <= capability.uses
            && self.command.is_none_or(|given| may_carry(capability, given))
            && match secret {
                // A token is the issuer's, whatever the secret is; a certificate goes to its agent alone.
                Some(secret) => {
                    let is_ca = matches!(secret.source, SecretSource::SshCa(_));
                    allows(&secret.allow, request)
                        && (channel == Channel::Token || is_ca == (channel == Channel::Ssh))
                }
                None => {
                    audience.secret.as_str() == "sublet.issuer"
                        && channel == Channel::Token
                        && allows(&self.config.issuer.allow, request)
                }
            }
    }

    fn check_grant(&self, grant: &Grant, request: &Request) {
        assert_eq!(grant.request(), request);
        let declared = self.profile.capability(&request.capability).expect("it is declared");
        assert_eq!(grant.capability(), &**declared);
        assert!(declared.audiences.contains(grant.audience()));
        assert_eq!(grant.audience().host, request.audience);
        assert!(declared.channels.contains(&grant.channel()));
        assert!(request.channel.is_none_or(|c| c == grant.channel()));
        assert_eq!(Some(grant.place()), grant.audience().place(grant.channel()).as_ref());
        assert_eq!(grant.secret(), &grant.audience().secret);
        match (grant.channel(), grant.source()) {
            (Channel::Token, SecretSource::Jwt(jwt)) => {
                assert!(jwt.audience.as_ref().is_some_and(|audience| !audience.is_empty()));
                assert_eq!(jwt.ttl, self.config.issuer.token_ttl);
            }
            (_, source) => assert_eq!(source, &self.config.secrets[grant.secret()].source),
        }
        assert!(grant.ttl() <= self.config.leases.max_ttl);
        assert!(declared.ttl.is_none_or(|most| grant.ttl() <= most));
        match request.ttl {
            Some(asked) => assert_eq!(grant.ttl(), asked),
            None => assert!(grant.ttl() <= self.config.leases.default_ttl),
        }
        assert!(grant.uses() <= declared.uses);
        assert_eq!(grant.uses(), request.uses.unwrap_or(NonZeroU32::MIN));
        assert_eq!(grant.is_pinned(), !declared.is_any_command());
    }
}

fn allows(allow: &[AllowPattern], request: &Request) -> bool {
    allow.iter().any(|pattern| {
        let text = pattern.to_string();
        let (c, a) = text.split_once('@').unwrap_or_default();
        labels_match(c, request.capability.as_str()) && host_matches(a, request.audience.as_str())
    })
}

fn check_denial(denial: &Denial, request: &Request) {
    assert_eq!(denial.asked, request.asked());
    assert!(!denial.message.is_empty() && !denial.hint.is_empty(), "{denial:?}");
}

fn share_a_place(a: &Grant, b: &Grant) -> bool {
    match (a.place(), b.place()) {
        (Place::Git, Place::Git) => {
            (a.audience().host == b.audience().host)
                && (a.audience().protocol == b.audience().protocol)
        }
        (Place::Token { kind: a }, Place::Token { kind: b }) => a == b,
        (a, b) => a.variable().is_some() && a.variable() == b.variable(),
    }
}

/// DESIGN's rule for commands: some pattern matches element by element, and the program is a file of that
/// name found on PATH, or that very file, which the exec cannot write.
fn may_carry(capability: &Capability, given: &Given) -> bool {
    let any = |elements: &[PatternElement]| matches!(elements, [PatternElement::Rest]);
    if capability.command.iter().any(|pattern| any(pattern.elements())) {
        return true;
    }
    !given.writable_by_exec
        && capability.command.iter().any(|pattern| {
            let elements = pattern.elements();
            let open = matches!(elements.last(), Some(PatternElement::Rest));
            let fixed = if open { &elements[..elements.len() - 1] } else { elements };
            let long_enough = if open {
                given.argv.len() >= fixed.len()
            } else {
                given.argv.len() == fixed.len()
            };
            long_enough
                && !given.argv.is_empty()
                && fixed.iter().zip(&given.argv).enumerate().all(|(nth, (element, word))| {
                    match element {
                        PatternElement::One | PatternElement::Rest => true,
                        PatternElement::Literal(text) if nth > 0 => word == text.as_str(),
                        PatternElement::Literal(text) => is_program(text, word, given),
                    }
                })
        })
}

fn is_program(wanted: &str, word: &OsString, given: &Given) -> bool {
    let program = given.program.as_path();
    let base = program.file_name();
    if wanted.starts_with('/') {
        let said = word == wanted || (given.found_on_path && Some(word.as_os_str()) == base);
        program == std::path::Path::new(wanted) && said
    } else {
        given.found_on_path
            && program.is_absolute()
            && base == Some(wanted.as_ref())
            && (word == wanted || word == program.as_os_str())
    }
}

fn labels_match(pattern: &str, name: &str) -> bool {
    let (wanted, given): (Vec<_>, Vec<_>) =
        (pattern.split('.').collect(), name.split('.').collect());
    pattern == "*"
        || (wanted.len() == given.len()
            && wanted
                .iter()
                .zip(&given)
                .all(|(w, g)| if *w == "*" { !g.is_empty() } else { w == g }))
}

fn host_matches(pattern: &str, audience: &str) -> bool {
    fn split(text: &str) -> (&str, &str) {
        let port = text.rfind(':').filter(|_| !text.ends_with(']'));
        port.map_or((text, ""), |at| (&text[..at], &text[at..]))
    }
    let ((host, port), (name, given)) = (split(pattern), split(audience));
    pattern == "*"
        || (labels_match(host, name) && (port == given || (port == ":*" && !given.is_empty())))
}
