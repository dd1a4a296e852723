//! What a session orders, and what is done for it.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::event::epoll;

use super::watched::{Key, ROOT, Token};
use super::{Asked, HEAD_FILE, Launcher, LauncherError, Live, MAX_HELPERS, tell, watch};
use crate::launcher::compile;
use crate::launcher::exec::{Begun, BrokerEnds, Exec, Setting};
use crate::launcher::explain;
use crate::launcher::mint;
use crate::launcher::source::{self, Helper};
use crate::launcher::wire::{self, ExecNumber, Notice, Order, Refusal, RefusalKind, Ticket};
use crate::model::name::SecretName;
use crate::sys::{clock, cpu};

impl Launcher {
    pub(super) fn obey(
        &mut self,
        session: Key,
        order: Order,
        fds: Vec<OwnedFd>,
    ) -> Result<(), LauncherError> {
        match order {
            Order::Ahead(ahead) => {
                self.build_ahead(session, *ahead);
                Ok(())
            }
            Order::Prepare(prepare) => self.prepare(session, *prepare),
            Order::Start { exec, deliveries, deadline } => {
                self.with(session, exec, |e| e.start(deliveries, deadline))
            }
            Order::Signal { exec, signal } => self.with(session, exec, |e| e.signal(signal)),
            Order::Extend { exec, delivery, expires } => self.with(session, exec, |e| {
                e.deliveries.extend(delivery as usize, expires);
                Ok(())
            }),
            Order::Revoke { exec, delivery } => self.with(session, exec, |e| {
                e.revoke(delivery as usize);
                Ok(())
            }),
            Order::Replace { exec, delivery } => self.replace(session, exec, delivery),
            Order::Replaced { exec, delivery, bytes } => self.with(session, exec, |e| {
                if let Err(e) = e.deliveries.put_replacement(delivery as usize, bytes as usize) {
                    // The version that stands there is good for a while, and the broker tries again.
                    eprintln!("sublet: launcher: {}", compile::chain(&e));
                }
                Ok(())
            }),
            Order::Kill { exec } => self.with(session, exec, |e| {
                e.kill();
                Ok(())
            }),
            Order::OpenSource { secret, ticket } => self.open_source(session, &secret, ticket),
            Order::Mint { secret, ticket } => self.mint(session, &secret, ticket, fds),
            Order::Session if session == ROOT => self.open_session(fds),
            Order::KeepHead { head } if session == ROOT => {
                let refusal = self.keep_head(&head).err().map(|e| Refusal {
                    kind: RefusalKind::Launch,
                    message: format!(
                        "could not keep the trail's head in {}: {e}",
                        self.setting.host.state_dir.join(HEAD_FILE).display()
                    ),
                    hint: "check the space and the mode of the state directory".to_owned(),
                });
                self.notify(session, &Notice::HeadKept { refusal }, &[])
            }
            Order::Session | Order::KeepHead { .. } | Order::Settle(_) => {
                eprintln!("sublet: launcher: a session ends: its orders are the root session's");
                self.end_session(session)
            }
            Order::Find(find) => {
                let Setting { host, here } = &self.setting;
                let found = compile::find(&find, host, here.mode);
                self.notify(session, &Notice::Found { found }, &[])
            }
            Order::Explain(prepare) => {
                let explanation = explain::explain(&prepare, &self.setting);
                self.notify(session, &Notice::Explained { explanation }, &[])
            }
        }
    }

    fn build_ahead(&mut self, session: Key, ahead: wire::Ahead) {
        let wire::Ahead { spec, cpu } = ahead;
        // What came before is of no use any more.
        self.ahead.remove(&session);
        self.quiet_at = None;
        self.seeds.live = self.execs.len();
        // Only speed hangs on it.
        match cpu::leave_to_waker(cpu as usize) {
            Ok(()) | Err(_) => {}
        }
        let (setting, warm, seeds) = (&self.setting, &mut self.warm, &mut self.seeds);
        // The exec tries again, and its caller is told.
        if let Ok(begun) = Begun::ahead(spec, setting, warm, seeds) {
            self.ahead.insert(session, begun);
        }
        // Its broker may decide against it.
        self.quiet_after_start();
    }

    fn prepare(&mut self, session: Key, prepare: wire::Prepare) -> Result<(), LauncherError> {
        let number = prepare.exec;
        let Some(socket) = self.sessions.get(&session) else { return Ok(()) };
        if self.key_of(session, number).is_some() || prepare.argv.is_empty() {
            let refusal = Refusal {
                kind: RefusalKind::Invalid,
                message: "an exec needs a number of its own and a command".to_owned(),
                hint: String::new(),
            };
            return self.notify(session, &Notice::Refused { exec: number, refusal }, &[]);
        }
        let prepared = |ends: BrokerEnds| {
            let fds: Vec<_> = ends.fds.iter().map(AsFd::as_fd).collect();
            let notice = Notice::Prepared { exec: number, uid: ends.uid };
            // A broker that is gone is seen in the next turn.
            if let Err(e) = tell(socket.as_fd(), session, &notice, &fds) {
                eprintln!("sublet: launcher: {}", compile::chain(&e));
            }
        };
        let ahead = self.ahead.remove(&session);
        self.quiet_at = None;
        self.seeds.live = self.execs.len();
        // Only speed hangs on it.
        match cpu::leave_to_waker(prepare.cpu as usize) {
            Ok(()) | Err(_) => {}
        }
        let (setting, warm, seeds) = (&self.setting, &mut self.warm, &mut self.seeds);
        match Exec::prepare(prepare, setting, ahead, warm, seeds, prepared) {
            Ok(exec) => {
                let key = self.fresh_key();
                watch(&self.epoll, exec.socket(), Token::Socket(key))?;
                watch(&self.epoll, exec.pidfd(), Token::Process(key))?;
                // Its source may take long.
                self.quiet_after_start();
                self.execs.insert(key, Live { exec, session });
                self.numbers.insert((session, number), key);
                self.reschedule(key);
                Ok(())
            }
            Err(refusal) => {
                self.quiet_at = Some(clock::boottime());
                self.notify(session, &Notice::Refused { exec: number, refusal }, &[])
            }
        }
    }

    fn replace(
        &mut self,
        session: Key,
        number: ExecNumber,
        delivery: u32,
    ) -> Result<(), LauncherError> {
        let Some(key) = self.key_of(session, number) else { return Ok(()) };
        let Some(live) = self.execs.get_mut(&key) else { return Ok(()) };
        let (fd, refusal) = match live.exec.deliveries.replace(delivery as usize) {
            Ok(fd) => (Some(fd), None),
            Err(refusal) => (None, Some(refusal)),
        };
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        self.notify(session, &Notice::Replacement { exec: number, delivery, refusal }, &fds)
    }

    /// Does something with an exec; what cannot be done ends it.
    fn with(
        &mut self,
        session: Key,
        number: ExecNumber,
        act: impl FnOnce(&mut Exec) -> Result<(), Refusal>,
    ) -> Result<(), LauncherError> {
        // It may have ended while the order was under way.
        let Some(key) = self.key_of(session, number) else { return Ok(()) };
        let Some(live) = self.execs.get_mut(&key) else { return Ok(()) };
        if let Err(refusal) = act(&mut live.exec) {
            live.exec.refuse(refusal);
        }
        self.reschedule(key);
        Ok(())
    }

    fn open_source(
        &mut self,
        session: Key,
        secret: &SecretName,
        ticket: Ticket,
    ) -> Result<(), LauncherError> {
        let opened = self
            .refuse_too_many_helpers(secret)
            .and_then(|()| source::open(&self.setting.host.config, secret));
        match opened {
            Err(refusal) => self.notify(session, &Notice::SourceRefused { ticket, refusal }, &[]),
            Ok(opened) => {
                let notice = Notice::Source { ticket, helper: opened.helper.is_some() };
                self.notify(session, &notice, &[opened.reader.as_fd()])?;
                match opened.helper {
                    Some(helper) => self.watch_helper(helper, session, ticket),
                    None => Ok(()),
                }
            }
        }
    }

    fn mint(
        &mut self,
        session: Key,
        secret: &SecretName,
        ticket: Ticket,
        fds: Vec<OwnedFd>,
    ) -> Result<(), LauncherError> {
        let (config, mode) = (&self.setting.host.config, self.setting.here.mode);
        let started = self
            .refuse_too_many_helpers(secret)
            .and_then(|()| mint::start(&self.program, config, mode, secret, fds));
        match started {
            Err(refusal) => self.notify(session, &Notice::SourceRefused { ticket, refusal }, &[]),
            Ok(helper) => self.watch_helper(helper, session, ticket),
        }
    }

    fn refuse_too_many_helpers(&self, secret: &SecretName) -> Result<(), Refusal> {
        if self.helpers.len() < MAX_HELPERS {
            return Ok(());
        }
        let why = format!("{MAX_HELPERS} sources are being asked already");
        Err(source::refusal(secret, why, "try again: each ends with its deadline at the latest"))
    }

    fn watch_helper(
        &mut self,
        helper: Helper,
        session: Key,
        ticket: Ticket,
    ) -> Result<(), LauncherError> {
        let key = self.fresh_key();
        watch(&self.epoll, helper.pidfd.as_fd(), Token::Helper(key))?;
        self.helpers.insert(key, Asked { helper, session, ticket });
        Ok(())
    }

    pub(super) fn helper_ended(&mut self, key: Key) -> Result<(), LauncherError> {
        let Some(Asked { helper, session, ticket }) = self.helpers.remove(&key) else {
            return Ok(());
        };
        epoll::delete(&self.epoll, helper.pidfd.as_fd())?;
        let refusal = helper.reap(clock::boottime());
        self.notify(session, &Notice::SourceEnded { ticket, refusal }, &[])
    }

    /// Written in place: the encoding tells a torn write from a rollback. Not synced: it is for tampering,
    /// and what a power cut may take from the trail it may take from here. But for the first time: else
    /// the cut leaves a file without content, which is no older head but none.
    fn keep_head(&self, head: &[u8]) -> io::Result<()> {
        let path = self.setting.host.state_dir.join(HEAD_FILE);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            // A broker that is not root compares the trail with it. A number and a hash are no secret.
            .mode(0o644)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        let is_fresh = file.metadata()?.len() == 0;
        file.write_all(head)?;
        if is_fresh {
            file.sync_all()?;
            File::open(&self.setting.host.state_dir)?.sync_all()?;
        }
        Ok(())
    }
}
