//! Containers of a real `runc`, on bundles that a test makes: a root of busybox alone, or with the host's
//! `/usr` where a program that is linked dynamically must run.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

use super::host::has_unified_cgroups;
use super::outcome::Outcome;
use super::world::{World, binary, finish};

static NUMBER: AtomicU32 = AtomicU32::new(0);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    Runc,
    /// Where v1 and v2 are side by side, which it refuses, in a mount namespace that has v2 alone.
    Crun,
}

pub struct Bundle<'a> {
    world: &'a World,
    pub runtime: Runtime,
    pub dir: PathBuf,
    pub id: String,
    pub config: Value,
}

impl<'a> Bundle<'a> {
    /// A container of busybox that executes `script`, as root and with a root that it can write.
    #[track_caller]
    pub fn new(world: &'a World, script: &str) -> Self {
        super::needs("runc", "runc");
        super::needs("busybox", "busybox-static");
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let id = format!("sublet-test-{}-{number}", std::process::id());
        let dir = world.path(&id);
        let root = dir.join("rootfs");
        for name in ["bin", "proc", "dev", "sys", "etc", "tmp", "work", "run"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::copy(super::which("busybox").unwrap(), root.join("bin/busybox")).unwrap();
        for applet in [
            "sh", "ls", "cat", "id", "sleep", "env", "readlink", "ps", "touch", "find", "grep",
            "wc", "pwd", "kill", "true", "stat", "mount", "head", "base64", "tr", "mkdir",
        ] {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
        std::os::unix::fs::chown(root.join("work"), Some(1000), Some(1000)).unwrap();
        let made = Command::new("runc").arg("spec").current_dir(&dir).status().unwrap();
        assert!(made.success());
        let text = fs::read_to_string(dir.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["process"]["terminal"] = false.into();
        config["process"]["cwd"] = "/work".into();
        config["process"]["args"] = json!(["/bin/sh", "-c", script]);
        config["root"]["readonly"] = false.into();
        // Where v1 and v2 are mounted side by side it cannot be mounted.
        if !has_unified_cgroups() {
            config["mounts"].as_array_mut().unwrap().retain(|mount| mount["type"] != "cgroup");
        }
        Self { world, runtime: Runtime::Runc, dir, id, config }
    }

    pub fn root(&self, path: &str) -> PathBuf {
        self.dir.join("rootfs").join(path)
    }

    /// The host's programs and libraries beside busybox: sublet is linked dynamically here.
    pub fn with_host_tools(mut self) -> Self {
        fs::create_dir(self.root("usr")).unwrap();
        for merged in ["lib", "lib64"] {
            symlink(format!("usr/{merged}"), self.root(merged)).unwrap();
        }
        self.mount(json!({
            "destination": "/usr", "source": "/usr", "type": "none", "options": ["rbind", "ro"],
        }));
        self
    }

    pub fn mount(&mut self, mount: Value) {
        self.config["mounts"].as_array_mut().unwrap().push(mount);
    }

    pub fn annotated(mut self, profile: &str) -> Self {
        self.config["annotations"] = json!({
            "dev.sublet.profile": profile,
            "dev.sublet.principal": "root",
            "dev.sublet.agent": "reviewer",
        });
        self
    }

    /// Sublet's hooks at these stages, of this world's host.
    pub fn hooked(mut self, stages: &[&str]) -> Self {
        for stage in stages {
            self.config["hooks"][*stage] = json!([{
                "path": binary(),
                "args": [
                    "sublet", "--config", self.world.path("etc/sublet.toml"),
                    "--state-dir", self.world.state(), "hook", stage,
                ],
                "env": ["PATH=/usr/bin:/bin"],
            }]);
        }
        self
    }

    /// All that are needed.
    pub fn guarded(self) -> Self {
        self.hooked(&["createRuntime", "createContainer", "poststart", "poststop"])
    }

    pub fn write(&self) {
        fs::write(self.dir.join("config.json"), self.config.to_string()).unwrap();
    }

    pub fn by(mut self, runtime: Runtime) -> Self {
        self.runtime = runtime;
        self
    }

    fn runc(&self, args: &[&str]) -> Command {
        let root = self.world.path("runc");
        match self.runtime {
            Runtime::Runc => {
                let mut command = Command::new("runc");
                command.arg("--root").arg(root).args(args);
                command
            }
            Runtime::Crun => {
                let mut command = unified("crun");
                if !has_unified_cgroups() {
                    command.arg("--cgroup-manager=disabled");
                }
                command.arg("--root").arg(root).args(args);
                command
            }
        }
    }

    /// Runs it to its end.
    pub fn run(&self) -> Outcome {
        self.write();
        let mut command = self.runc(&["run", "--bundle"]);
        command.arg(&self.dir).arg(&self.id);
        finish(command, b"", None)
    }

    /// Starts it and leaves it running.
    #[track_caller]
    pub fn start(&self) -> Container<'_> {
        self.write();
        let said = self.dir.join("said");
        let mut command = self.runc(&["run", "--detach", "--bundle"]);
        command.arg(&self.dir).arg(&self.id).stdin(Stdio::null());
        let file = fs::File::create(&said).unwrap();
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let status = command.status().unwrap();
        assert!(status.success(), "{}", fs::read_to_string(&said).unwrap());
        let state = finish(self.runc(&["state", &self.id]), b"", None).ok().json();
        Container { bundle: self, pid: state["pid"].as_i64().unwrap() as i32, said }
    }

    /// The containers that runc knows of here.
    pub fn known(&self) -> String {
        finish(self.runc(&["list", "--quiet"]), b"", None).ok().out()
    }

    /// What a hook would be given of this bundle.
    pub fn state(&self, pid: i32) -> String {
        json!({
            "ociVersion": "1.0.2", "id": self.id, "status": "creating", "pid": pid,
            "bundle": self.dir, "annotations": self.config["annotations"],
        })
        .to_string()
    }
}

pub struct Container<'a> {
    bundle: &'a Bundle<'a>,
    pub pid: i32,
    said: PathBuf,
}

impl Container<'_> {
    /// A command inside, by runc: as anything in the container could do it.
    pub fn exec(&self, script: &str) -> Outcome {
        finish(self.bundle.runc(&["exec", &self.bundle.id, "/bin/sh", "-c", script]), b"", None)
    }

    /// The same as another user, `UID:GID`.
    pub fn exec_as(&self, user: &str, script: &str) -> Outcome {
        let args = ["exec", "--user", user, &self.bundle.id, "/bin/sh", "-c", script];
        finish(self.bundle.runc(&args), b"", None)
    }

    pub fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap_or_default()
    }

    pub fn delete(self) {}
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let deleted = finish(self.bundle.runc(&["delete", "--force", &self.bundle.id]), b"", None);
        if !std::thread::panicking() {
            deleted.ok();
        }
    }
}

/// A program of containers where cgroups are v2 alone: here, or else in a mount namespace that shows it so.
#[track_caller]
pub fn unified(program: &str) -> Command {
    super::needs(program, program);
    if has_unified_cgroups() {
        return Command::new(program);
    }
    super::needs("unshare", "util-linux");
    let mut command = Command::new("unshare");
    let script = "mount -t cgroup2 none /sys/fs/cgroup; exec \"$0\" \"$@\"";
    command.args(["--mount", "--propagation", "private", "sh", "-ec", script, program]);
    command
}

/// A file that anyone may read.
pub fn put(path: &Path, content: impl AsRef<[u8]>) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
}
