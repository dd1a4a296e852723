//! Which broker a command speaks to: a run's socket or the host's control socket; and how it reads when
//! nobody answers there.
//!
//! `--socket` goes before all. In a sandbox the agent's socket is `SUBLET_SOCKET`, else the one at its
//! known place. On the host the sockets lie in the runtime directory that configuration and state
//! directory lead to.
#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::fail::{Failure, NO};
use super::{Globals, load};
use crate::api::client::{AGENT_SOCKET, Client, ClientError, SOCKET_VARIABLE};
use crate::api::wire::ErrorObject;
use crate::model::id::RunId;
use crate::model::verdict::DenyReason;

/// Where a socket's path came from: what there is to try depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Flag,
    Sandbox,
    Control,
    Run,
}

/// The socket of one run: the one that this is, or `run`'s on the host.
///
/// # Errors
/// No run is named, and this is no sandbox; the socket is another run's; nobody answers.
pub fn of_a_run(
    globals: &Globals,
    named: Option<&Path>,
    run: Option<&RunId>,
) -> Result<Client, Failure> {
    let given = named.map(|path| (path.to_owned(), Origin::Flag)).or_else(sandbox);
    if let Some((path, origin)) = given {
        let client = connect(path, origin)?;
        if let Some(asked) = run {
            let actual = client.run().map_err(|e| Failure::from(&e))?;
            is_of(&client, &actual.run_id, asked)?;
        }
        return Ok(client);
    }
    let Some(run) = run else {
        return Err(Failure::new("usage", "no_run", "no run is named, and this is no sandbox")
            .hint(
                "name one with --run; sublet runs list shows them, sublet runs start makes one",
            ));
    };
    let runs = load::host(globals)?.runtime_dir.join("runs");
    connect(runs.join(run.as_str()).join("agent.sock"), Origin::Run)
}

/// The socket for what both kinds serve: the agent's in a sandbox, else the host's control socket; and the
/// run to ask for there. A run's own socket shows that run alone and takes no other's name.
///
/// # Errors
/// As [`of_a_run`].
pub fn of_either<'a>(
    globals: &Globals,
    named: Option<&Path>,
    run: Option<&'a RunId>,
) -> Result<(Client, Option<&'a RunId>), Failure> {
    let given = named.map(|path| (path.to_owned(), Origin::Flag)).or_else(sandbox);
    let Some((path, origin)) = given else {
        return Ok((connect(control(globals)?, Origin::Control)?, run));
    };
    let client = connect(path, origin)?;
    let Some(asked) = run else { return Ok((client, None)) };
    match client.run() {
        Ok(actual) => is_of(&client, &actual.run_id, asked).map(|()| (client, None)),
        // A control socket is no run's.
        Err(ClientError::Refused { status: 404, .. }) => Ok((client, run)),
        Err(e) => Err(Failure::from(&e)),
    }
}

/// The socket is the identity: naming a run cannot change whose it is.
fn is_of(client: &Client, actual: &RunId, asked: &RunId) -> Result<(), Failure> {
    if actual == asked {
        return Ok(());
    }
    let message = format!("{} is run {actual}'s socket, not {asked}'s", client.path().display());
    Err(Failure::new("request", "run_mismatch", message)
        .hint("leave --run out, or name that run's socket with --socket"))
}

/// The control socket, for what it alone serves.
///
/// # Errors
/// This is a sandbox; nobody answers.
pub fn of_the_host(globals: &Globals, named: Option<&Path>) -> Result<Client, Failure> {
    if let Some(path) = named {
        return connect(path.to_owned(), Origin::Flag);
    }
    if let Some((path, _)) = sandbox() {
        return Err(Failure::new(
            "request",
            "control_only",
            "this belongs to the host's control socket, and this is a sandbox",
        )
        .why(format!("the socket here is an agent's: {}", path.display()))
        .hint("ask whoever runs the host, or name a control socket with --socket"));
    }
    connect(control(globals)?, Origin::Control)
}

/// The agent's socket, if this is a sandbox.
fn sandbox() -> Option<(PathBuf, Origin)> {
    let named = std::env::var_os(SOCKET_VARIABLE).filter(|path| !path.is_empty());
    let known = || Some(PathBuf::from(AGENT_SOCKET)).filter(|path| path.exists());
    named.map(PathBuf::from).or_else(known).map(|path| (path, Origin::Sandbox))
}

fn control(globals: &Globals) -> Result<PathBuf, Failure> {
    Ok(load::host(globals)?.runtime_dir.join("control.sock"))
}

fn connect(path: PathBuf, origin: Origin) -> Result<Client, Failure> {
    Client::connect(path).map_err(|error| match error {
        ClientError::Connect { path, source } => unreachable(&path, &source, origin),
        other => Failure::from(&other),
    })
}

fn unreachable(path: &Path, source: &io::Error, origin: Origin) -> Failure {
    let errno = source.raw_os_error().map(Errno::from_raw_os_error);
    let (why, lack) = match errno {
        Some(Errno::NOENT | Errno::NOTDIR) => ("there is no such socket (ENOENT)", Lack::Socket),
        Some(Errno::CONNREFUSED) => {
            ("nothing listens on it any more (ECONNREFUSED)", Lack::Listener)
        }
        Some(Errno::ACCESS | Errno::PERM) => ("it is not open to you (EACCES)", Lack::Permission),
        Some(Errno::AGAIN) => {
            ("it listens, and has not taken the connection in time (EAGAIN)", Lack::Time)
        }
        _ => {
            return Failure::new("connect", "broker_unreachable", no_broker(path))
                .because(source)
                .hint("name the broker's socket with --socket");
        }
    };
    let start = "start it with `sublet serve` or `systemctl start sublet`, or name its socket with \
                 --socket";
    let hint = match (lack, origin) {
        (Lack::Socket | Lack::Listener, Origin::Sandbox) => {
            "the host must serve this sandbox's run and bind its socket here: sublet runs start"
        }
        (Lack::Socket, Origin::Run) => {
            "the run may have ended: see `sublet runs list`; or start the broker with `sublet serve`"
        }
        (Lack::Socket | Lack::Listener, _) => start,
        (Lack::Permission, _) => {
            "call as root or as the user who serves, or name a socket that is yours with --socket"
        }
        (Lack::Time, _) => "the broker is busy or stopped: look at `systemctl status sublet`",
    };
    Failure::new("connect", "broker_unreachable", no_broker(path)).why(why).hint(hint)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lack {
    Socket,
    Listener,
    Permission,
    Time,
}

fn no_broker(path: &Path) -> String {
    format!("no broker answers at {}", path.display())
}

/// The broker's own words; a denial is the answer no.
pub fn refused(error: &ErrorObject) -> Failure {
    // As `sublet run` tells a denial: what and its name on one line, why on the next.
    let denied = format!(" is denied: {}", error.reason);
    let split = error.message.split_once(&format!("{denied}: "));
    let failure = match split {
        Some((asked, why)) => {
            Failure::new(error.stage.as_str(), &error.reason, format!("{asked}{denied}")).why(why)
        }
        None => Failure::new(error.stage.as_str(), &error.reason, error.message.clone()),
    };
    let failure = failure.hint(error.hint.clone());
    let is_denial = DenyReason::ALL.iter().any(|reason| reason.as_str() == error.reason);
    if is_denial { failure.exit(NO) } else { failure }
}

impl From<&ClientError> for Failure {
    fn from(error: &ClientError) -> Self {
        let failure = |reason: &str| {
            Failure::new("connect", reason, error.to_string()).because_of_source(error)
        };
        match error {
            ClientError::Refused { error, .. } => refused(error),
            ClientError::Connect { path, source } => unreachable(path, source, Origin::Flag),
            ClientError::Silent => failure("broker_silent")
                .hint("the broker is busy or stopped: look at `systemctl status sublet`"),
            ClientError::Lost => Failure::new("run", "exec_lost", error.to_string())
                .why("it died or was stopped, and what it ran is killed")
                .hint(
                    "look at its log (journalctl -u sublet), and at `sublet audit list --last 20`",
                ),
            ClientError::Send(_) | ClientError::Receive(_) | ClientError::Cut => {
                failure("broker_unreachable")
                    .hint("it may have ended meanwhile: look at its log (journalctl -u sublet)")
            }
            ClientError::Encode(_) => failure("invalid_request"),
            ClientError::Http(_)
            | ClientError::Framing(_)
            | ClientError::TooLarge { .. }
            | ClientError::Json { .. }
            | ClientError::Unexplained { .. }
            | ClientError::Frame(_)
            | ClientError::Misplaced(_) => failure("answer_invalid").hint(
                "is the socket sublet's, and the broker of the same version as this command?",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_nobody_answers_it_says_what_why_and_what_to_try() {
        #[track_caller]
        fn check(errno: Errno, origin: Origin, why: &str, hint: &str) {
            let failure = unreachable(Path::new("/x.sock"), &errno.into(), origin);
            let text = failure.text(false);
            assert!(text.starts_with("sublet: no broker answers at /x.sock\n"), "{text}");
            assert!(text.contains(why) && failure.hint.contains(hint), "{text}");
            assert_eq!(failure.exit, super::super::fail::TROUBLE);
        }
        check(Errno::NOENT, Origin::Control, "ENOENT", "systemctl start sublet");
        check(Errno::NOENT, Origin::Run, "ENOENT", "runs list");
        check(Errno::NOENT, Origin::Sandbox, "ENOENT", "bind its socket");
        check(Errno::CONNREFUSED, Origin::Flag, "ECONNREFUSED", "sublet serve");
        check(Errno::ACCESS, Origin::Control, "EACCES", "as root");
        check(Errno::AGAIN, Origin::Control, "EAGAIN", "busy");
        check(Errno::NAMETOOLONG, Origin::Flag, "too long", "--socket");
    }

    #[test]
    fn a_brokers_denial_reads_as_one_of_our_own() {
        let denial = crate::model::verdict::Denial {
            asked: "repo.push@github.com".into(),
            reason: DenyReason::PermissionMissing,
            message: "alice does not hold repo:write".into(),
            hint: "add it".into(),
        };
        let ours = Failure::from(denial).exit(NO);
        let object: ErrorObject = serde_json::from_value(ours.object()).unwrap();
        assert_eq!(refused(&object), ours);
    }

    #[test]
    fn a_denial_is_the_answer_no_and_all_else_is_trouble() {
        #[track_caller]
        fn check(reason: &str, exit: u8) {
            let error = ErrorObject {
                stage: "decide".into(),
                reason: reason.into(),
                message: "what: why".into(),
                hint: "try".into(),
            };
            let failure = refused(&error);
            assert_eq!(failure.exit, exit, "{reason}");
            let said = serde_json::to_value(&error).unwrap();
            assert_eq!(failure.object(), said, "the broker's words, whole");
        }
        check("permission_missing", NO);
        check("audit_unavailable", NO);
        check("not_found", super::super::fail::TROUBLE);
        check("draining", super::super::fail::TROUBLE);
    }
}
