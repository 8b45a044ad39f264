"""Sections of NVIDIA's resiliency packages: known so that they are refused by name."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lockstep.config.fields import opt
from lockstep.config.section import Section


@dataclass(kw_only=True)
class InProcessRestartConfig(Section):
    """In-process restart."""

    section_name: ClassVar[str] = "inprocess_restart"

    enabled: bool = opt(False, "--inprocess-restart", refused="in-process restart is not supported")
    max_iterations: int | None = opt(None, "--inprocess-max-iterations", refused="in-process restart is not supported")
    monitor_thread_interval: float = opt(
        1.0, "--inprocess-monitor-thread-interval", refused="in-process restart is not supported"
    )
    monitor_process_interval: float = opt(
        1.0, "--inprocess-monitor-process-interval", refused="in-process restart is not supported"
    )
    progress_watchdog_interval: float = opt(
        1.0, "--inprocess-progress-watchdog-interval", refused="in-process restart is not supported"
    )
    heartbeat_interval: float = opt(
        30.0, "--inprocess-heartbeat-interval", refused="in-process restart is not supported"
    )
    soft_timeout: float = opt(60.0, "--inprocess-soft-timeout", refused="in-process restart is not supported")
    hard_timeout: float = opt(90.0, "--inprocess-hard-timeout", refused="in-process restart is not supported")
    heartbeat_timeout: float = opt(60.0, "--inprocess-heartbeat-timeout", refused="in-process restart is not supported")
    barrier_timeout: float = opt(120.0, "--inprocess-barrier-timeout", refused="in-process restart is not supported")
    completion_timeout: float = opt(
        120.0, "--inprocess-completion-timeout", refused="in-process restart is not supported"
    )
    last_call_wait: float = opt(1.0, "--inprocess-last-call-wait", refused="in-process restart is not supported")
    termination_grace_time: float = opt(
        1.0, "--inprocess-termination-grace-time", refused="in-process restart is not supported"
    )
    granularity: Literal["node", "rank"] = opt(
        "node", "--inprocess-granularity", refused="in-process restart is not supported"
    )
    active_world_size: int = opt(1, "--inprocess-active-world-size", refused="in-process restart is not supported")
    empty_cuda_cache: bool = opt(False, "--inprocess-empty-cuda-cache", refused="in-process restart is not supported")


@dataclass(kw_only=True)
class FaultToleranceConfig(Section):
    """Fault tolerance."""

    section_name: ClassVar[str] = "ft"

    enable_ft_package: bool = opt(
        False, "--enable-ft-package", refused="NVIDIA's fault-tolerance package is not supported"
    )
    calc_ft_timeouts: bool = opt(
        False, "--calc-ft-timeouts", refused="NVIDIA's fault-tolerance package is not supported"
    )
    ft_num_warmup_iters: int = opt(
        5, "--ft-num-warmup-iters", refused="NVIDIA's fault-tolerance package is not supported"
    )


@dataclass(kw_only=True)
class FaultInjectorConfig(Section):
    """Fault injection."""

    section_name: ClassVar[str] = "fault_injector"

    fault_injector_ranks: str | None = opt(None, "--fault-injector-ranks", refused="fault injection is not supported")
    fault_injector_num_ranks: int | None = opt(
        None, "--fault-injector-num-ranks", refused="fault injection is not supported"
    )
    fault_injector_fault_types: str | None = opt(
        None, "--fault-injector-fault-types", refused="fault injection is not supported"
    )
    fault_injector_fault_probabilities: str | None = opt(
        None, "--fault-injector-fault-probabilities", refused="fault injection is not supported"
    )
    fault_injector_fault_delay: float | None = opt(
        None, "--fault-injector-fault-delay", refused="fault injection is not supported"
    )
    fault_injector_delay_start_iteration: int | None = opt(
        None, "--fault-injector-delay-start-iteration", refused="fault injection is not supported"
    )
    fault_injector_mtti_seconds: float | None = opt(
        None, "--fault-injector-mtti-seconds", refused="fault injection is not supported"
    )
    fault_injector_offset_seconds: float | None = opt(
        None, "--fault-injector-offset-seconds", refused="fault injection is not supported"
    )
    fault_injector_seed: int | None = opt(None, "--fault-injector-seed", refused="fault injection is not supported")
