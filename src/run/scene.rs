//! The request, made whole: configuration, profile, run, command and environment, read once by the
//! broker and checked before anything is decided.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use zeroize::Zeroizing;

use super::entries::{Leased, Who};
use super::error::RunError;
use crate::host::{self, Host, Places, ProfileRef, Program, container};
use crate::launcher::client::Session;
use crate::launcher::into::InContainer;
use crate::launcher::wire::{
    Ahead, DeliverySpec, Find, GitSpec, Notice, Order, Prepare, Spec, TokenSpec,
};
use crate::model::digest::{self, ValueDigest};
use crate::model::id::{ExecId, LeaseId, RequestId, RunId};
use crate::model::lease::LeaseRecord;
use crate::model::moment::{Moment, Span};
use crate::model::name::{Channel, IdentityName, SecretName, VariableName};
use crate::model::run::{Run, RunState};
use crate::policy::environment::{self, Context, Given};
use crate::policy::{LeaseFlag, Reason, Request, ResolvedCommand};
use crate::profile::{Capability, Format, NetworkMode, Profile};
use crate::source::vault::{KeySource, VaultError};
use crate::sys::cpu;

/// What the caller of `sublet run` asks for, parsed.
pub struct Asked {
    pub places: Places,
    pub profile: ProfileRef,
    /// Absolute, with every link resolved.
    pub workspace: PathBuf,
    pub leases: Vec<LeaseFlag>,
    pub reason: Option<Reason>,
    pub run_id: Option<RunId>,
    pub agent: IdentityName,
    pub principal: IdentityName,
    /// The command's own environment.
    pub environment: Vec<Given>,
    pub timeout: Option<Span>,
    /// Rows and columns of a terminal for the command.
    pub terminal: Option<(u16, u16)>,
    pub network: Option<NetworkMode>,
    pub command: Vec<OsString>,
    /// `--into`, with what is asked of an exec in a container.
    pub into: InContainer,
}

/// What a client of the broker asks for: an exec of its run, under leases that it has.
pub struct AskedOfRun {
    pub run: Run,
    pub exec_id: ExecId,
    /// As they are recorded; what they are worth is decided when they are used.
    pub leases: Vec<LeaseRecord>,
    pub reason: Option<Reason>,
    pub environment: Vec<Given>,
    pub timeout: Option<Span>,
    pub terminal: Option<(u16, u16)>,
    pub network: Option<NetworkMode>,
    pub command: Vec<OsString>,
    /// What is asked of an exec in a container; whether it is in one, its run says.
    pub into: InContainer,
}

impl AskedOfRun {
    /// What the launcher can begin with while the exec is decided on: what [`Scene::prepare`] will say of its
    /// sandbox. Not where an exec of these leases would be refused for sure, nor in a container, of which
    /// more must be known.
    pub fn ahead(&self, host: &Host) -> Option<Order> {
        let is_open = |lease: &LeaseRecord| lease.state.is_open() && lease.uses_left > 0;
        if container::is_of_a_container(&self.run.run_id) || !self.leases.iter().all(is_open) {
            return None;
        }
        let spec = Spec {
            run_id: self.run.run_id.clone(),
            profile: ProfileRef::parse(&self.run.profile),
            workspace: self.run.workspace.clone(),
            without_network: self.network == Some(NetworkMode::None),
            home: Some(host.home_for(None).to_owned()),
            binary: self.leases.iter().any(|lease| lease.channel == Channel::Git),
            agent: self.leases.is_empty(),
            into: self.into.clone(),
        };
        let cpu = cpu::current() as u32;
        Some(Order::Ahead(Box::new(Ahead { spec, cpu })))
    }
}

/// Everything that the later stages read and none of them changes.
pub struct Scene {
    pub host: Arc<Host>,
    pub profile: Profile,
    pub profile_ref: ProfileRef,
    pub run: Run,
    pub is_new_run: bool,
    pub exec_id: ExecId,
    /// Of its leases, or its own where it has none.
    pub request_id: RequestId,
    pub requests: Vec<Request>,
    /// The leases that the requests stand for, where they were granted before.
    pub held: Option<Vec<LeaseId>>,
    /// One a request: of the leases that were granted before, or that are to be granted.
    pub lease_ids: Vec<LeaseId>,
    pub reason: Option<Reason>,
    pub command: Vec<OsString>,
    pub terminal: Option<(u16, u16)>,
    pub timeout: Option<Duration>,
    pub hostname: String,
    pub now: Moment,
    network: Option<NetworkMode>,
    program: Option<Program>,
    environment: BTreeMap<OsString, OsString>,
    given: Vec<(VariableName, OsString)>,
    home: PathBuf,
    into: InContainer,
}

/// The exec among those of its session: there is one.
pub const EXEC: u32 = 1;

pub fn set(asked: Asked, exec_id: ExecId, session: &Session) -> Result<Scene, RunError> {
    let now = crate::host::now().map_err(RunError::Clock)?;
    let host = Host::load(&asked.places)?;
    let run = Run {
        run_id: asked.run_id.clone().unwrap_or_else(RunId::fresh),
        permissions: host.config.permissions_of(&asked.principal).to_vec(),
        agent: asked.agent,
        principal: asked.principal,
        profile: asked.profile.to_string(),
        workspace: asked.workspace,
        state: RunState::Active,
        started_at: now.wall,
    };
    let request_id = RequestId::fresh();
    let requests: Vec<Request> = asked
        .leases
        .into_iter()
        .map(|flag| flag.into_request(request_id.clone(), run.run_id.clone(), asked.reason.clone()))
        .collect();
    let parts = Parts {
        profile: host.profile(&asked.profile)?,
        host: Arc::new(host),
        profile_ref: asked.profile,
        run,
        is_new_run: asked.run_id.is_none(),
        exec_id,
        requests,
        held: None,
        reason: asked.reason,
        environment: asked.environment,
        timeout: asked.timeout,
        terminal: asked.terminal,
        network: asked.network,
        command: asked.command,
        home: host::home(),
        is_in_container: asked.into.pid.is_some(),
        into: asked.into,
        now,
    };
    parts.compose(session, |name| std::env::var_os(name.as_str()))
}

/// The scene of an exec of the broker.
pub fn of_run(host: &Arc<Host>, asked: AskedOfRun, session: &Session) -> Result<Scene, RunError> {
    let now = crate::host::now().map_err(RunError::Clock)?;
    let requests = asked.leases.iter().map(|lease| Request {
        request_id: lease.request_id.clone(),
        run_id: lease.run_id.clone(),
        capability: lease.capability.clone(),
        audience: lease.audience.clone(),
        channel: Some(lease.channel),
        ttl: None,
        uses: None,
        reason: None,
    });
    let profile_ref = ProfileRef::parse(&asked.run.profile);
    let profile = host.profile(&profile_ref)?;
    let is_pinned = asked.leases.iter().any(|lease| {
        profile.capability(&lease.capability).is_some_and(|capability| !capability.is_any_command())
    });
    // What the profile passes on from its invoker comes from the client, unless the exec is pinned: then
    // its environment is the profile's and the deliveries'. The rest the client sets by itself.
    let (passed, given): (Vec<_>, Vec<_>) = asked
        .environment
        .into_iter()
        .partition(|g| !is_pinned && profile.environment.pass.contains(&g.name));
    let parts = Parts {
        requests: requests.collect(),
        held: Some(asked.leases.iter().map(|lease| lease.lease_id.clone()).collect()),
        host: Arc::clone(host),
        profile,
        profile_ref,
        is_in_container: container::is_of_a_container(&asked.run.run_id),
        into: asked.into,
        run: asked.run,
        is_new_run: false,
        exec_id: asked.exec_id,
        reason: asked.reason,
        environment: given,
        timeout: asked.timeout,
        terminal: asked.terminal,
        network: asked.network,
        command: asked.command,
        home: host.home_for(None).to_owned(),
        now,
    };
    parts.compose(session, |name| passed.iter().find(|g| g.name == *name).map(|g| g.value.clone()))
}

/// What both have in common.
struct Parts {
    host: Arc<Host>,
    profile: Profile,
    profile_ref: ProfileRef,
    run: Run,
    is_new_run: bool,
    exec_id: ExecId,
    requests: Vec<Request>,
    held: Option<Vec<LeaseId>>,
    reason: Option<Reason>,
    environment: Vec<Given>,
    timeout: Option<Span>,
    terminal: Option<(u16, u16)>,
    network: Option<NetworkMode>,
    command: Vec<OsString>,
    home: PathBuf,
    is_in_container: bool,
    into: InContainer,
    now: Moment,
}

impl Parts {
    fn compose(
        self,
        session: &Session,
        invoker: impl Fn(&VariableName) -> Option<OsString>,
    ) -> Result<Scene, RunError> {
        let Parts { host, mut profile, profile_ref, run, requests, home, command, .. } = self;
        if let Some(mode) = self.network {
            if mode == NetworkMode::Audience {
                return Err(RunError::WouldWiden(
                    "network mode `audience` needs sublet's proxy, which this version does not have"
                        .to_owned(),
                ));
            }
            profile.narrow_network(mode).map_err(|e| RunError::WouldWiden(e.to_string()))?;
        }
        let given = self.environment.iter().map(|g| (g.name.clone(), g.value.clone())).collect();
        let environment = {
            // By what is asked for, since nothing is granted yet; a denial comes before any of it
            // matters.
            let leased = requests.iter().filter_map(|r| {
                let capability: &Capability = profile.capability(&r.capability)?;
                Some((capability, r.channel.or(capability.channels.first().copied())?))
            });
            let context = Context::new(&profile, leased);
            environment::compose(&context, self.environment, invoker, &home)?
        };
        let program = match (requests.is_empty(), command.first()) {
            (false, Some(name)) if self.is_in_container => {
                let (workspace, into) = (run.workspace.clone(), self.into.clone());
                let find = Find {
                    run_id: run.run_id.clone(),
                    profile: profile_ref.clone(),
                    workspace,
                    home: Some(home.clone()),
                    into,
                    name: name.as_bytes().to_vec(),
                };
                find_in_container(session, find)?
            }
            (false, Some(name)) => Program::find(name, &profile, &run.workspace, &home),
            _ => None,
        };
        let timeout =
            [self.timeout, profile.limits.timeout].into_iter().flatten().min().map(|s| s.0);
        let lease_ids = match &self.held {
            Some(held) => held.clone(),
            None => requests.iter().map(|_| LeaseId::fresh()).collect(),
        };
        let request_id = requests.first().map(|request| request.request_id.clone());
        Ok(Scene {
            lease_ids,
            request_id: request_id.unwrap_or_else(RequestId::fresh),
            host,
            profile_ref,
            run,
            is_new_run: self.is_new_run,
            exec_id: self.exec_id,
            requests,
            held: self.held,
            reason: self.reason,
            command,
            terminal: self.terminal,
            timeout,
            hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            now: self.now,
            network: self.network,
            program,
            environment,
            given,
            home,
            into: self.into,
            profile,
        })
    }
}

/// Which file a command is in a container: the launcher looks, for it alone can.
fn find_in_container(session: &Session, find: Find) -> Result<Option<Program>, RunError> {
    session.order(&Order::Find(Box::new(find)))?;
    match session.notice_of(|notice| matches!(notice, Notice::Found { .. }))?.0 {
        Notice::Found { found } => Ok(found?.map(|found| {
            Program::in_container(found.path, found.found_on_path, found.can_be_changed)
        })),
        _ => Err(RunError::LauncherDied),
    }
}

impl Scene {
    /// `CLOCK_BOOTTIME` at which a lease is to be renewed by itself, if it is.
    pub fn renewal_of(&self, lease: &Leased) -> Option<Duration> {
        let policy = &self.host.config.leases;
        let is_renewed = policy.auto_renew && lease.grant.capability().renewable;
        let at = lease.record.expires_boot.saturating_sub(policy.renew_before_expiry.0);
        // A lease shorter than that is renewed at half of its time.
        let half = lease.record.expires_boot.saturating_sub(lease.ttl / 2);
        is_renewed.then_some(at.max(half))
    }

    pub fn who(&self) -> Who<'_> {
        Who { run: &self.run, hostname: &self.hostname, now: &self.now }
    }

    /// Whether this process lives for this exec alone.
    pub fn is_one_shot(&self) -> bool {
        self.held.is_none()
    }

    /// The command as the policy judges it.
    pub fn resolved(&self) -> Option<ResolvedCommand<'_>> {
        self.program.as_ref().map(|program| program.as_command(&self.command))
    }

    /// The order for the launcher. Which delivery goes where follows from the profile alone; what is not
    /// granted is never filled or started.
    pub fn prepare(&self) -> Prepare {
        let deliveries = self.requests.iter().zip(&self.lease_ids).filter_map(|(request, id)| {
            let capability = self.profile.capability(&request.capability)?;
            let audience = capability.audience(&request.audience)?;
            let channel = request.channel.or(capability.channels.first().copied())?;
            let git = (channel == Channel::Git).then(|| GitSpec {
                protocol: audience.protocol.as_ref().map_or("https", |p| p.as_str()).to_owned(),
                host: audience.host.clone(),
            });
            let token = (channel == Channel::Token).then(|| {
                TokenSpec::of(&audience.identity.clone().unwrap_or_default(), id.as_str())
            });
            let endpoint = audience.format == Some(Format::AwsEndpoint);
            Some(DeliverySpec {
                channel,
                variable: audience.delivery_name()?,
                git,
                token,
                endpoint,
            })
        });
        let pinned = self
            .requests
            .iter()
            .any(|r| self.profile.capability(&r.capability).is_some_and(|c| !c.is_any_command()));
        let program = self.program.as_ref().filter(|_| pinned).map(|p| p.path.clone());
        Prepare {
            exec: EXEC,
            exec_id: self.exec_id.clone(),
            run_id: self.run.run_id.clone(),
            profile: self.profile_ref.clone(),
            workspace: self.run.workspace.clone(),
            argv: self.command.iter().map(|a| a.as_bytes().to_vec()).collect(),
            program,
            environment: self
                .environment
                .iter()
                .filter_map(|(name, value)| {
                    let name = name.to_str()?.parse().ok()?;
                    Some((name, value.clone().into_vec()))
                })
                .collect(),
            without_network: self.network == Some(NetworkMode::None),
            terminal: self.terminal,
            deliveries: deliveries.collect(),
            // A leased command has what it needs; it is the agent who asks.
            agent: self.requests.is_empty() && !self.is_new_run,
            home: Some(self.home.clone()),
            into: self.into.clone(),
            cpu: cpu::current() as u32,
        }
    }

    /// The keyed digests of what the command is given: the values of variables, then its arguments. Each as it is, and as
    /// the line that `echo` makes of it, which may be what was kept.
    pub fn digests_of_given(&self, vault: &KeySource) -> Result<Vec<[ValueDigest; 2]>, VaultError> {
        let key = vault.load()?;
        let values = self.given.iter().map(|(_, value)| value).chain(&self.command);
        Ok(values
            .map(|value| {
                let line = Zeroizing::new([value.as_bytes(), b"\n"].concat());
                [key.digest(value.as_bytes()), key.digest(&line)]
            })
            .collect())
    }

    /// A managed value must not come in by the back door, as a variable or as an argument (which the
    /// trail would keep). Compared by keyed digest, so whole. `given`: [`Scene::digests_of_given`].
    pub fn refuse_managed_values(
        &self,
        managed: &[(SecretName, ValueDigest)],
        given: Result<Vec<[ValueDigest; 2]>, VaultError>,
    ) -> Result<(), RunError> {
        if managed.is_empty() {
            return Ok(());
        }
        for (index, digests) in given.map_err(super::value::unavailable_vault)?.iter().enumerate() {
            if let Some(secret) = digests.iter().find_map(|d| digest::matching(d, managed)) {
                let what = match self.given.get(index) {
                    Some((name, _)) => format!("the value given for `{name}`"),
                    None => format!("argument {}", index - self.given.len()),
                };
                return Err(RunError::ManagedValue { what, secret: secret.clone() });
            }
        }
        Ok(())
    }
}
