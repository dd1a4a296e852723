//! `sublet hook`: what a container runtime calls while it makes and ends a container (runtime-spec, POSIX
//! platform hooks).
//!
//! Receives the stage and the container's state; refuses a container that holds a managed value, starts a
//! run for it, gives it the run's socket, and ends the run with it. Whatever fails makes the runtime give
//! the container up, and leaves nothing behind. Holds no value: the guard compares fingerprints.
//!
//! - [`state`], [`bundle`], [`annotations`]: what is told of the container, parsed
//! - [`guard`], [`layers`], [`tree`]: whether it may start
//! - [`mount`]: what it is given; [`identity`]: where its tokens stand
#![forbid(unsafe_code)]

pub mod annotations;
pub mod bundle;
pub mod guard;
pub mod identity;
pub mod layers;
pub mod mount;
pub mod state;
pub mod tree;

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::api::client::{Client, ClientError};
use crate::api::wire::RunBody;
use crate::guard::Scanner;
use crate::host::container::{self, Record};
use crate::host::{Host, HostError, ProfileRef};
use crate::model::id::RunId;
use crate::model::run::RunState;
use annotations::{AnnotationError, Wanted};
use bundle::{Bundle, BundleError};
use guard::Objection;
use mount::MountError;
use state::{State, StateError};
use tree::TreeError;

/// When it is called. The names are the runtime-spec's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    CreateRuntime,
    CreateContainer,
    StartContainer,
    Poststart,
    Poststop,
}

/// Where the host keeps what the hook needs.
pub struct Setting<'a> {
    pub host: &'a Host,
    pub runtime_dir: &'a Path,
    pub control: &'a Path,
}

#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    #[error("container `{id}` is refused: {}", told(.objections))]
    Refused { id: String, objections: Vec<Objection> },
    #[error("the image of container `{id}` could not be searched for managed values")]
    Tree { id: String, source: TreeError },
    #[error("the broker does not answer at {path}, and without it no container is started")]
    Broker { path: PathBuf, source: Box<ClientError> },
    #[error("the broker's fingerprints do not fit this hook")]
    Fingerprints(#[source] crate::guard::told::Misfit),
    #[error("could not {doing} the run of container `{id}`")]
    Run { doing: &'static str, id: String, source: Box<ClientError> },
    #[error("container `{id}` has no run: `sublet hook createRuntime` did not come before")]
    NoRun { id: String },
    #[error("the run of container `{id}` has ended before it started")]
    Over { id: String },
    #[error("the process {pid} of container `{id}` is gone")]
    Gone { id: String, pid: i32 },
    #[error("could not keep the record of container `{id}` in {path}")]
    Record { id: String, path: PathBuf, source: io::Error },
    #[error("this runtime calls createContainer outside of the container's mount namespace")]
    WrongNamespace,
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Identity(#[from] identity::DirectoryError),
    #[error("the profile of the container cannot be taken")]
    Profile(#[source] HostError),
    #[error("could not give the container its socket")]
    Inside { source: io::Error },
    #[error("could not read the boot id")]
    Boot(#[source] io::Error),
}

fn told(objections: &[Objection]) -> String {
    let all: Vec<String> = objections.iter().map(Objection::to_string).collect();
    all.join("; ")
}

/// One call of the hook.
pub fn perform(stage: Stage, input: &[u8], setting: &Setting<'_>) -> Result<(), HookError> {
    let state = state::parse(input, stage)?;
    match stage {
        Stage::CreateRuntime => create_runtime(&state, setting),
        Stage::CreateContainer => create_container(&state, setting),
        Stage::StartContainer => start_container(&state, setting),
        Stage::Poststart => poststart(&state, setting),
        Stage::Poststop => poststop(&state, setting),
    }
}

/// The guard, and then the run.
fn create_runtime(state: &State, setting: &Setting<'_>) -> Result<(), HookError> {
    let bundle = bundle::open(&state.bundle)?;
    let wanted = wanted(state, &bundle, setting)?;
    let client = connect(setting)?;
    let (key, prints, _) = client
        .guard()
        .map_err(|source| broker(setting, source))?
        .into_parts()
        .map_err(HookError::Fingerprints)?;
    let scanner = Scanner::new(key, prints);
    let (objections, _) = guard::objections(&bundle, &scanner, setting.runtime_dir)
        .map_err(|source| HookError::Tree { id: state.id.clone(), source })?;
    if !objections.is_empty() {
        return Err(HookError::Refused { id: state.id.clone(), objections });
    }
    match wanted {
        Some(wanted) => register(state, &bundle, wanted, &client, setting),
        None => Ok(()),
    }
}

fn wanted(
    state: &State,
    bundle: &Bundle,
    setting: &Setting<'_>,
) -> Result<Option<Wanted>, HookError> {
    // A runtime gives the configuration's own; what it adds counts as well.
    let mut all = bundle.annotations.clone();
    for (key, value) in &state.annotations {
        all.entry(key.clone()).or_insert_with(|| value.clone());
    }
    Ok(annotations::parse(&all, &bundle.cwd, &setting.host.config.hook)?)
}

fn register(
    state: &State,
    bundle: &Bundle,
    wanted: Wanted,
    client: &Client,
    setting: &Setting<'_>,
) -> Result<(), HookError> {
    let id = || state.id.clone();
    let failed = |source| HookError::Record {
        id: id(),
        path: setting.runtime_dir.join(container::DIRECTORY),
        source,
    };
    let pid = state.pid.unwrap_or_default();
    let gone = || HookError::Gone { id: id(), pid };
    let started = container::started(pid).map_err(|_| gone())?;
    let boot_id = crate::host::now().map_err(HookError::Boot)?.boot_id;
    let prefix = prefix(&state.id);
    for old in container::all(setting.runtime_dir, Some(&prefix)).map_err(failed)? {
        if (old.pid, old.started, &old.boot_id) == (pid, started, &boot_id) {
            // Called once more for the same container.
            return match client.run_of(&old.run_id) {
                Ok(run) if run.state == RunState::Active => Ok(()),
                Ok(_) => Err(HookError::Over { id: id() }),
                Err(source) => {
                    Err(HookError::Run { doing: "look up", id: id(), source: source.into() })
                }
            };
        }
        // An earlier container of this name, whose end nobody told.
        end(client, &old.run_id).map_err(|source| HookError::Run {
            doing: "end an earlier",
            id: id(),
            source: source.into(),
        })?;
        container::remove(setting.runtime_dir, &old.run_id).map_err(failed)?;
    }
    let incarnation = Sha256::digest(format!("{}\0{pid}\0{started}\0{boot_id}", state.id));
    let run_id = format!("{prefix}{}", crate::guard::told::hex(&incarnation[..4]));
    let record = Record {
        run_id: run_id.parse().map_err(|_| HookError::NoRun { id: id() })?,
        container_id: state.id.clone(),
        pid,
        started,
        boot_id: boot_id.clone(),
        uid: bundle.uid,
        gid: bundle.gid,
        workspace: wanted.workspace,
        rootfs: bundle.rootfs.clone(),
        made: mount::missing(bundle.root.as_fd()),
        mount_namespace: mount_namespace(),
    };
    // Before the run: broker and launcher know by it that this is a container's.
    container::write(setting.runtime_dir, &record).map_err(failed)?;
    let profile = wanted.profile.clone();
    let body = RunBody {
        agent: wanted.agent,
        principal: wanted.principal,
        profile: wanted.profile,
        workspace: record.workspace.clone(),
        run_id: Some(record.run_id.clone()),
    };
    if let Err(source) = client.start_run(&body) {
        container::remove(setting.runtime_dir, &record.run_id).map_err(failed)?;
        return Err(HookError::Run { doing: "start", id: id(), source: source.into() });
    }
    let given = project(&record, &profile, client, setting).and_then(|()| {
        match bundle.has_user_namespace {
            true => give_from_outside(&record, bundle, setting),
            false => Ok(()),
        }
    });
    if record.is_alive(&boot_id) && given.is_ok() {
        return Ok(());
    }
    // It died meanwhile: no one may be there to call poststop.
    let ended = end(client, &record.run_id);
    container::remove(setting.runtime_dir, &record.run_id).map_err(failed)?;
    ended.map_err(|source| HookError::Run { doing: "end", id: id(), source: source.into() })?;
    given?;
    Err(gone())
}

/// The identity tokens of the profile, where the host permits it and there are some.
fn project(
    record: &Record,
    profile: &str,
    client: &Client,
    setting: &Setting<'_>,
) -> Result<(), HookError> {
    if !setting.host.config.hook.project_token {
        return Ok(());
    }
    let profile = setting.host.profile(&ProfileRef::parse(profile)).map_err(HookError::Profile)?;
    if profile.projected().next().is_none() {
        return Ok(());
    }
    identity::make(setting.runtime_dir, &record.run_id, record.uid)?;
    client.project(&record.run_id).map(drop).map_err(|source| HookError::Run {
        doing: "project the identity tokens of",
        id: record.container_id.clone(),
        source: source.into(),
    })
}

/// Forks: who enters a mount namespace can open nothing of the host's any more.
fn give_from_outside(
    record: &Record,
    bundle: &Bundle,
    setting: &Setting<'_>,
) -> Result<(), HookError> {
    let gone = || HookError::Gone { id: record.container_id.clone(), pid: record.pid };
    let mounts = std::fs::File::open(format!("/proc/{}/ns/mnt", record.pid)).map_err(|_| gone())?;
    // It is that process's, if that still lives.
    if !record.is_alive(&record.boot_id) {
        return Err(gone());
    }
    let runs = crate::host::agent_socket(setting.runtime_dir, &record.run_id);
    let runs = runs.parent().unwrap_or(&runs);
    let binary = setting.host.config.hook.binary.as_deref();
    let failed = |source: io::Error| HookError::Inside { source };
    let (mut told, tell) = io::pipe().map_err(failed)?;
    let pid = match crate::sys::process::fork().map_err(failed)? {
        crate::sys::process::Forked::Child => {
            let given = mount::give_from_outside(mounts.as_fd(), &bundle.rootfs, runs, binary);
            let words = given.err().map(|e| crate::launcher::compile::chain(&e));
            let mut tell = tell;
            let written = words.map(|words| io::Write::write_all(&mut tell, words.as_bytes()));
            crate::sys::process::exit_now(i32::from(written.is_some()))
        }
        crate::sys::process::Forked::Parent { pid } => pid,
    };
    drop(tell);
    let mut words = String::new();
    io::Read::read_to_string(&mut told, &mut words).map_err(failed)?;
    let status = crate::sys::process::wait_for(pid).map_err(|e| failed(e.into()))?;
    match status.code() {
        Some(0) => Ok(()),
        _ => Err(failed(io::Error::other(words))),
    }
}

/// Its socket and the binary, in the container's own mount namespace.
fn create_container(state: &State, setting: &Setting<'_>) -> Result<(), HookError> {
    let bundle = bundle::open(&state.bundle)?;
    if wanted(state, &bundle, setting)?.is_none() {
        return Ok(());
    }
    if bundle.has_user_namespace {
        // Done from outside: who runs this may look, and no more.
        return match mount::is_given(bundle.root.as_fd()) {
            true => Ok(()),
            false => Err(HookError::NoRun { id: state.id.clone() }),
        };
    }
    let record = record_of(state, setting)?;
    if record.mount_namespace == mount_namespace() {
        return Err(HookError::WrongNamespace);
    }
    let runs = crate::host::agent_socket(setting.runtime_dir, &record.run_id);
    let runs = runs.parent().unwrap_or(&runs);
    mount::give(bundle.root.as_fd(), runs, setting.host.config.hook.binary.as_deref())?;
    Ok(())
}

/// Inside the container: its socket must answer, for this container.
fn start_container(state: &State, setting: &Setting<'_>) -> Result<(), HookError> {
    if annotations::parse(&state.annotations, Path::new("/"), &setting.host.config.hook)?.is_none()
    {
        return Ok(());
    }
    let run = Client::connect(crate::api::client::AGENT_SOCKET).and_then(|client| client.run());
    let run = run.map_err(|source| HookError::Broker {
        path: crate::api::client::AGENT_SOCKET.into(),
        source: source.into(),
    })?;
    if run.run_id.as_str().starts_with(&prefix(&state.id)) && run.state == RunState::Active {
        return Ok(());
    }
    Err(HookError::NoRun { id: state.id.clone() })
}

/// The run must be there, and be this container's.
fn poststart(state: &State, setting: &Setting<'_>) -> Result<(), HookError> {
    if annotations::parse(&state.annotations, Path::new("/"), &setting.host.config.hook)?.is_none()
    {
        return Ok(());
    }
    let record = record_of(state, setting)?;
    let run = connect(setting)?.run_of(&record.run_id).map_err(|source| HookError::Run {
        doing: "look up",
        id: state.id.clone(),
        source: source.into(),
    })?;
    match run.state {
        RunState::Active => Ok(()),
        RunState::Ended => Err(HookError::Over { id: state.id.clone() }),
    }
}

/// The end of the run: whatever fails, the rest is done. A container that never had one has no record.
fn poststop(state: &State, setting: &Setting<'_>) -> Result<(), HookError> {
    let prefix = prefix(&state.id);
    let failed = |source| HookError::Record {
        id: state.id.clone(),
        path: setting.runtime_dir.join(container::DIRECTORY),
        source,
    };
    let records = container::all(setting.runtime_dir, Some(&prefix)).map_err(failed)?;
    if records.is_empty() && !state.annotations.keys().any(|k| k.starts_with("dev.sublet.")) {
        return Ok(());
    }
    let mut ended = end_all(setting, &prefix, &state.id);
    for record in records {
        let wiped = identity::wipe(setting.runtime_dir, &record.run_id).map_err(failed);
        ended = ended.and(wiped);
        let flags = rustix::fs::OFlags::PATH
            | rustix::fs::OFlags::DIRECTORY
            | rustix::fs::OFlags::NOFOLLOW
            | rustix::fs::OFlags::CLOEXEC;
        let root = rustix::fs::open(&record.rootfs, flags, rustix::fs::Mode::empty());
        if let Ok(root) = root {
            mount::remove(root.as_fd(), &record.made);
        }
        // With it gone, the next start of a broker that did not answer ends the run.
        container::remove(setting.runtime_dir, &record.run_id).map_err(failed)?;
    }
    ended
}

/// All runs of the container that are active, recorded or not.
fn end_all(setting: &Setting<'_>, prefix: &str, id: &str) -> Result<(), HookError> {
    let failed = |source: ClientError| HookError::Run {
        doing: "end",
        id: id.to_owned(),
        source: source.into(),
    };
    let client = connect(setting)?;
    let runs = client.runs().map_err(failed)?;
    for run in runs.iter().filter(|run| run.state == RunState::Active) {
        if run.run_id.as_str().starts_with(prefix) {
            end(&client, &run.run_id).map_err(failed)?;
        }
    }
    Ok(())
}

/// Ends a run; one that the broker does not know has ended.
fn end(client: &Client, run: &RunId) -> Result<(), ClientError> {
    match client.end_run(run) {
        Ok(_) | Err(ClientError::Refused { status: 404, .. }) => Ok(()),
        Err(e) => Err(e),
    }
}

fn record_of(state: &State, setting: &Setting<'_>) -> Result<Record, HookError> {
    let records = container::all(setting.runtime_dir, Some(&prefix(&state.id)));
    let records = records.map_err(|source| HookError::Record {
        id: state.id.clone(),
        path: setting.runtime_dir.join(container::DIRECTORY),
        source,
    })?;
    records.into_iter().next().ok_or_else(|| HookError::NoRun { id: state.id.clone() })
}

fn connect(setting: &Setting<'_>) -> Result<Client, HookError> {
    Client::connect(setting.control).map_err(|source| broker(setting, source))
}

fn broker(setting: &Setting<'_>, source: ClientError) -> HookError {
    HookError::Broker { path: setting.control.to_owned(), source: source.into() }
}

fn prefix(container_id: &str) -> String {
    container::prefix(container_id, &Sha256::digest(container_id).into())
}

fn mount_namespace() -> String {
    let link = std::fs::read_link("/proc/self/ns/mnt").unwrap_or_default();
    link.to_string_lossy().into_owned()
}

impl HookError {
    /// The name that programs match on.
    pub fn reason(&self) -> &'static str {
        match self {
            HookError::State(_) => "state_invalid",
            HookError::Bundle(_) => "bundle_invalid",
            HookError::Annotation(_) => "annotation_invalid",
            HookError::Refused { .. } => "container_refused",
            HookError::Tree { .. } => "image_unreadable",
            HookError::Broker { .. } => "broker_unreachable",
            HookError::Fingerprints(_) => "fingerprints_invalid",
            HookError::Run { .. } => "run_failed",
            HookError::NoRun { .. } | HookError::Over { .. } => "no_run",
            HookError::Gone { .. } => "container_gone",
            HookError::Record { .. } => "record_failed",
            HookError::WrongNamespace => "wrong_namespace",
            HookError::Mount(_) | HookError::Inside { .. } => "mount_failed",
            HookError::Identity(_) | HookError::Profile(_) => "identity_failed",
            HookError::Boot(_) => "clock_unusable",
        }
    }

    /// What to try; empty where the message says it.
    pub fn hint(&self) -> &'static str {
        match self {
            HookError::Refused { .. } => {
                "take it out, and rotate what was in an image; the container's agent asks for a lease instead"
            }
            HookError::Broker { .. } => "start the service: systemctl start sublet",
            HookError::Fingerprints(_) => "let hook and service be of one version of sublet",
            HookError::NoRun { .. } => "configure all stages: see docs/oci.md",
            HookError::Tree { .. } => "look at the file system of the image",
            HookError::WrongNamespace => "use a runtime that follows the runtime-spec: runc, crun",
            HookError::State(_) => "a runtime calls this, with the state on standard input",
            _ => "",
        }
    }
}
