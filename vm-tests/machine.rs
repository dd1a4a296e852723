//! One machine: a QEMU without acceleration, its serial line, its monitor, its memory.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Result;

pub struct Spec<'a> {
    pub image: &'a Path,
    pub initramfs: &'a [u8],
    /// Added to the kernel's command line.
    pub append: String,
    pub megabytes: u32,
    pub cpus: u32,
    /// Added to the processor's model, `max`.
    pub cpu_flags: &'a str,
    /// Written to a snapshot that goes with the machine.
    pub root_disk: &'a Path,
    /// QEMU's words for further drives, each `if=virtio` and so on.
    pub drives: Vec<String>,
    pub more: Vec<String>,
    /// The guest's memory is this file.
    pub memory: Option<PathBuf>,
    pub patience: Duration,
}

pub struct Machine {
    child: Child,
    line: BufReader<UnixStream>,
    monitor: BufReader<UnixStream>,
    dir: PathBuf,
    deadline: Instant,
    partial: Vec<u8>,
    /// All that the guest said, for whoever looks later.
    heard: fs::File,
}

impl Machine {
    /// Boots it in `dir`, which must be fresh.
    pub fn boot(spec: &Spec<'_>, dir: &Path) -> Result<Self> {
        super::workshop::fresh_dir(dir)?;
        let initrd = dir.join("initramfs");
        fs::write(&initrd, spec.initramfs).map_err(|e| format!("{}: {e}", initrd.display()))?;
        let (line, monitor) = (dir.join("line"), dir.join("qmp"));
        // However the runner ends, its machines end with it.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc"]);
        qemu.args(["-accel", "tcg,thread=multi", "-cpu"])
            // This instruction leaves garbage in the flags in QEMU 7.2, and the kernel's allocator uses it.
            .arg(format!("max,-cx16{}", spec.cpu_flags));
        qemu.args(["-smp", &spec.cpus.to_string(), "-m", &format!("{}M", spec.megabytes)]);
        if let Some(memory) = &spec.memory {
            qemu.arg("-object").arg(format!(
                "memory-backend-file,id=ram,size={}M,share=on,mem-path={}",
                spec.megabytes,
                memory.display()
            ));
            qemu.args(["-machine", "memory-backend=ram"]);
        }
        qemu.arg("-kernel").arg(spec.image).arg("-initrd").arg(&initrd).arg("-append").arg(
            format!("console=ttyS0 panic=-1 quiet loglevel=4 random.trust_cpu=on {}", spec.append),
        );
        qemu.arg("-serial").arg(format!("file:{}", dir.join("console").display()));
        qemu.arg("-chardev")
            .arg(format!("socket,id=line,path={},server=on,wait=off", line.display()));
        qemu.args(["-serial", "chardev:line"]);
        qemu.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        // Nothing runs before the line is listened to.
        qemu.args(["-no-reboot", "-S"]);
        qemu.arg("-drive").arg(format!(
            "if=virtio,format=raw,snapshot=on,cache=unsafe,file={}",
            spec.root_disk.display()
        ));
        for drive in &spec.drives {
            qemu.arg("-drive").arg(drive);
        }
        qemu.args(&spec.more);
        let log = fs::File::create(dir.join("qemu.log")).map_err(|e| e.to_string())?;
        qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut child =
            qemu.spawn().map_err(|e| format!("cannot start qemu-system-x86_64: {e}"))?;
        let connected = connect(&line).and_then(|line| Ok((line, connect(&monitor)?)));
        let (line, monitor) = match connected {
            Ok(both) => both,
            Err(why) => {
                // It is ours, and has not been reaped.
                let _ = child.kill();
                let _ = child.wait();
                let log = fs::read_to_string(dir.join("qemu.log")).unwrap_or_default();
                return Err(format!("qemu does not answer: {why}\n{log}"));
            }
        };
        let mut machine = Self {
            child,
            line: BufReader::new(line),
            monitor: BufReader::new(monitor),
            dir: dir.to_owned(),
            deadline: Instant::now() + spec.patience,
            partial: Vec::new(),
            heard: fs::File::create(dir.join("heard")).map_err(|e| e.to_string())?,
        };
        machine.greeting()?;
        machine.resume()?;
        Ok(machine)
    }

    /// The next line that the guest says; none when the machine is off.
    ///
    /// # Errors
    /// Its time is over: then what the console has is part of the error.
    pub fn line(&mut self) -> Result<Option<String>> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("the guest took too long\n{}", self.console_end()));
            }
            self.line.get_ref().set_read_timeout(Some(left)).map_err(|e| e.to_string())?;
            match self.line.read_until(b'\n', &mut self.partial) {
                Ok(0) => return Ok(None),
                Ok(_) if !self.partial.ends_with(b"\n") => continue,
                Ok(_) => {
                    let line = String::from_utf8_lossy(&self.partial).trim_end().to_owned();
                    self.partial.clear();
                    writeln!(self.heard, "{line}").map_err(|e| format!("what was heard: {e}"))?;
                    return Ok(Some(line));
                }
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Ok(None),
                Err(e) => return Err(format!("the guest's line: {e}")),
            }
        }
    }

    /// As [`Machine::line`], until this moment: then there is none.
    pub fn line_until(&mut self, at: Instant) -> Result<Option<String>> {
        let deadline = std::mem::replace(&mut self.deadline, at);
        let line = self.line();
        self.deadline = deadline;
        match line {
            Err(_) if Instant::now() >= at => Ok(None),
            other => other,
        }
    }

    /// Whether the guest says anything before it ends. What it says is still to be read.
    pub fn has_begun(&mut self) -> Result<bool> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let set = self.line.get_ref().set_read_timeout(Some(left.max(Duration::from_millis(1))));
        set.map_err(|e| e.to_string())?;
        match self.line.fill_buf() {
            Ok(bytes) => Ok(!bytes.is_empty()),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => Ok(false),
            Err(e) => Err(format!("the guest says nothing: {e}\n{}", self.console_end())),
        }
    }

    /// Answers a guest that asked.
    pub fn answer(&mut self, text: &str) -> Result<()> {
        let bytes = format!("{text}\n");
        self.line
            .get_mut()
            .write_all(bytes.as_bytes())
            .map_err(|e| format!("the guest's line: {e}"))
    }

    /// The processors stand still.
    pub fn stop(&mut self) -> Result<()> {
        self.order("stop", json!({})).map(|_| ())
    }

    pub fn resume(&mut self) -> Result<()> {
        self.order("cont", json!({})).map(|_| ())
    }

    /// The power goes, at once: nothing in the guest hears of it.
    pub fn cut_power(mut self) -> Result<()> {
        // QEMU answers before it goes, or goes.
        self.child.kill().map_err(|e| format!("cannot end qemu: {e}"))?;
        self.child.wait().map(|_| ()).map_err(|e| format!("qemu: {e}"))
    }

    pub fn order(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let text = format!("{}\n", json!({"execute": name, "arguments": arguments}));
        self.monitor
            .get_mut()
            .write_all(text.as_bytes())
            .map_err(|e| format!("qemu, {name}: {e}"))?;
        loop {
            let answer = self.monitor_line()?;
            if let Some(result) = answer.get("return") {
                return Ok(result.clone());
            }
            if let Some(error) = answer.get("error") {
                return Err(format!("qemu, {name}: {error}"));
            }
        }
    }

    fn greeting(&mut self) -> Result<()> {
        self.monitor_line()?;
        self.order("qmp_capabilities", json!({})).map(|_| ())
    }

    fn monitor_line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let timeout = Some(Duration::from_secs(60));
        self.monitor.get_ref().set_read_timeout(timeout).map_err(|e| e.to_string())?;
        match self.monitor.read_line(&mut line) {
            Ok(0) => Err("qemu closed its monitor".to_owned()),
            Ok(_) => serde_json::from_str(&line).map_err(|e| format!("qemu said {line:?}: {e}")),
            Err(e) => Err(format!("qemu's monitor: {e}")),
        }
    }

    pub fn console(&self) -> String {
        let mut bytes = Vec::new();
        if let Ok(mut file) = fs::File::open(self.dir.join("console")) {
            // What cannot be read is not shown.
            let _ = file.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn console_end(&self) -> String {
        let text = self.console();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It is ours; one that has ended already is only reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(path: &Path) -> Result<UnixStream> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(e) if start.elapsed() > Duration::from_secs(20) => {
                return Err(format!("{}: {e}", path.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}
