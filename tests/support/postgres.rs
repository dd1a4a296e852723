//! A PostgreSQL server of a test's own, run as an ordinary user: it refuses to run as root.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::host::eventually;
use super::outcome::Outcome;
use super::which;
use super::world::finish;

/// `nobody`: initdb needs a user that passwd knows.
const NOBODY: u32 = 65_534;

pub struct Postgres {
    server: Option<Child>,
    pub port: u16,
    dir: tempfile::TempDir,
    password: String,
}

impl Postgres {
    /// With the superuser `admin`, who has this password.
    pub fn start(password: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("sublet-test-pg-").tempdir().unwrap();
        chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut postgres = Self { server: None, port, dir, password: password.to_owned() };
        let password_file = postgres.path("password");
        fs::write(&password_file, password).unwrap();
        chown(&password_file, Some(NOBODY), Some(NOBODY)).unwrap();
        let mut initdb = postgres.user(&bin_dir().join("initdb"));
        initdb.args(["-U", "admin", "--auth=scram-sha-256", "--no-sync", "-D"]);
        initdb.arg(postgres.path("data")).arg(format!("--pwfile={}", password_file.display()));
        finish(initdb, b"", None).ok();
        postgres.serve(&[]);
        postgres
    }

    /// Starts it again, with these settings.
    pub fn serve(&mut self, settings: &[&str]) {
        let log = fs::OpenOptions::new().append(true).create(true).open(self.path("log")).unwrap();
        let mut server = self.user(&bin_dir().join("postgres"));
        server.args(["-F", "-c", "listen_addresses=127.0.0.1", "-p", &self.port.to_string(), "-k"]);
        server.arg(self.dir.path()).arg("-D").arg(self.path("data"));
        for setting in settings {
            server.args(["-c", setting]);
        }
        server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.server = Some(server.spawn().unwrap());
        // It listens before it takes anyone in.
        eventually("PostgreSQL answers", || self.psql("select 1").status == Some(0));
    }

    /// Fast shutdown.
    pub fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let pid = rustix::process::Pid::from_child(&server);
            // The server is ours and not yet reaped.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
            let _ = server.wait();
        }
    }

    /// As the superuser, one statement after the other.
    pub fn psql(&self, sql: &str) -> Outcome {
        let mut psql = Command::new("psql");
        psql.env("PGPASSWORD", &self.password).args(["-w", "-h", "127.0.0.1", "-U", "admin"]);
        psql.args(["-d", "postgres", "-At", "-v", "ON_ERROR_STOP=1", "-c", sql]);
        psql.args(["-p", &self.port.to_string()]);
        finish(psql, b"", None)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A file of the server's, that nobody else reads.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
        path
    }

    fn user(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C");
        command.uid(NOBODY).gid(NOBODY).current_dir(self.dir.path());
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("PostgreSQL said:\n{}", self.log());
        }
        self.stop();
    }
}

fn bin_dir() -> PathBuf {
    if let Some(initdb) = which("initdb") {
        return fs::canonicalize(initdb).unwrap().parent().unwrap().to_owned();
    }
    let found = fs::read_dir("/usr/lib/postgresql").ok().and_then(|versions| {
        versions.flatten().map(|v| v.path().join("bin")).find(|b| b.join("initdb").exists())
    });
    found.expect("this test needs PostgreSQL: apt-get install postgresql")
}
