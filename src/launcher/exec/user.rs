//! The user of an exec on this host, and the user namespace that shows it a workspace of someone else's as its
//! own. Both can be made before there is an exec.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use super::make::ownership;
use super::{Setting, refuse_error};
use crate::config::UidPool;
use crate::launcher::compile::Compiled;
use crate::launcher::posture::Ownership;
use crate::launcher::wire::Refusal;
use crate::sandbox::identity::{self, Identity, IdmapNamespace, Mode};

/// A uid and gid.
pub(super) type Ids = (u32, u32);

/// A uid that is one exec's, or none's yet.
pub(super) struct User {
    pub uid: u32,
    /// It is taken for as long as a copy of this is open.
    pub lock: OwnedFd,
    pub mapped: Option<Mapped>,
}

/// A namespace that maps ids on disk to a user's.
pub(super) struct Mapped {
    ids: (Ids, Ids),
    namespace: OwnedFd,
}

impl User {
    pub fn take(pool: UidPool) -> Result<Self, Refusal> {
        let (uid, lock) = identity::take_uid(pool)
            .map_err(|e| refuse_error(&e, "check /run/sublet and [host] uid_pool"))?;
        Ok(Self { uid, lock, mapped: None })
    }

    /// With the namespace for a workspace of these ids.
    pub fn mapping(self, on_disk: Ids) -> Result<Self, Refusal> {
        let outside = (self.uid, self.uid);
        if self.mapped.as_ref().is_some_and(|mapped| mapped.ids == (on_disk, outside)) {
            return Ok(self);
        }
        let made = IdmapNamespace::new(on_disk, outside).map_err(|e| refuse_error(&e, ""))?;
        let mapped = Mapped { ids: (on_disk, outside), namespace: made.without_helper() };
        Ok(Self { mapped: Some(mapped), ..self })
    }
}

/// Whom an exec is to be, and how it has its workspace.
pub(super) struct Whose {
    pub identity: Identity,
    pub ownership: Ownership,
    pub lock: Option<OwnedFd>,
    pub mapped: Option<Mapped>,
}

impl Whose {
    /// `take`: takes a user of the pool, where it is not to be the caller.
    pub fn of(
        compiled: &Compiled,
        setting: &Setting,
        take: impl FnOnce(UidPool) -> Result<User, Refusal>,
    ) -> Result<Self, Refusal> {
        let mode = setting.here.mode;
        let (mut identity, lock, mapped) = match mode {
            Mode::Rootless => (Identity::of_caller(compiled.inside), None, None),
            Mode::Privileged => {
                let User { uid, lock, mapped } = take(setting.host.config.host.uid_pool)?;
                (Identity::pooled(compiled.inside, uid), Some(lock), mapped)
            }
        };
        let ownership = ownership(mode, compiled.workspace.as_ref(), &mut identity)?;
        Ok(Self { identity, ownership, lock, mapped })
    }
}

impl Mapped {
    /// The namespace, if it maps these.
    pub fn of(self, on_disk: Ids, outside: Ids) -> Option<IdmapNamespace> {
        (self.ids == (on_disk, outside)).then(|| IdmapNamespace::from(self.namespace))
    }
}
